"""The rules of nets, features, seeds, decoder and rows, each with value, rule and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cldf_dist.config import Classifier, Config, Contrast, Saliency, UNet

CAM_CHANNELS = (16, 8)  # at least, and a multiple of: what `nets/classifiers.py` can build
# every row that `segment` may have, as in scoring/masks.py, which imports torch
ROWS = (
    "gradcam", "gradcam_pp", "layercam", "gradient_map", "cdm", "cg_diff", "cg_cdm",
    "patch_classifier", "cldf", "cldf_plus", "raw_patches", "patch_features",
    "supervised_decoder", "supervised_plus",
)  # fmt: skip
PART = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")
TAP = re.compile(r"up(\d+)\.(\d+)")
OTHER_TAP = re.compile(r"image[13579]|cam[1234]")  # as in method/features.py, which imports torch


def method_rules(config: Config) -> Iterator[str]:
    """One sentence for each rule of the method that the configuration breaks."""
    yield from _levels_of("diffusion.net", config.diffusion.net, middle_attends=True)
    yield from _levels_of("classifier", config.classifier, middle_attends=False)
    yield from _cam(config)
    yield from _patch_classifier(config)
    yield from _label_tuning(config)
    yield from _unconditional(config)
    yield from _noise_levels(config)
    yield from _counterfactuals(config)
    yield from _taps(config)
    yield from _part(config)
    yield from _smoothing(config)
    yield from _decoder(config)
    yield from _shares(config)
    yield from _rows(config)


def _levels_of(path: str, net: UNet | Classifier, *, middle_attends: bool) -> Iterator[str]:
    """The rules of a diffusion network; its middle block may attend whatever the levels say."""
    if not net.channels:
        yield f"{path}.channels must have at least one level, e.g. [64, 128]"
        return
    if len(net.channels) != len(net.attention_levels):
        yield (
            f"{path}.attention_levels needs one entry per level of {path}.channels "
            f"({len(net.channels)}), got {len(net.attention_levels)}"
        )
    sizes = {
        name: getattr(net, name)
        for name in ("num_res_blocks", "norm_num_groups", "num_head_channels")
    }
    too_small = [name for name, size in sizes.items() if size < 1]
    for name in too_small:
        yield f"{path}.{name} must be >= 1, got {sizes[name]}"
    if too_small:
        return
    for channels in net.channels:
        if channels < 1 or channels % net.norm_num_groups:
            yield (
                f"{path}.channels must be positive multiples of {path}.norm_num_groups "
                f"({net.norm_num_groups}), got {channels}"
            )
    levels = [*net.attention_levels[:-1], True] if middle_attends else net.attention_levels
    for channels, attends in zip(net.channels, levels):
        if attends and channels > net.num_head_channels and channels % net.num_head_channels:
            yield (
                f"{path}.channels with attention must be multiples of {path}.num_head_channels "
                f"({net.num_head_channels}), got {channels}"
            )


def _cam(config: Config) -> Iterator[str]:
    lowest, step = CAM_CHANNELS
    channels, blocks = config.cam.channels, config.cam.blocks
    if len(channels) != 4 or any(width < lowest or width % step for width in channels):
        yield (
            f"cam.channels must be four multiples of {step}, each at least {lowest}, "
            f"got {list(channels)}"
        )
    if len(blocks) != 4 or any(number < 1 for number in blocks):
        yield f"cam.blocks must be four numbers >= 1, got {list(blocks)}"


def _patch_classifier(config: Config) -> Iterator[str]:
    settings = config.patch_classifier
    if settings.downsample >= 1 and config.data.image_size % settings.downsample:
        yield (
            f"patch_classifier.downsample must divide data.image_size ({config.data.image_size}), "
            f"got {settings.downsample}"
        )
    if not 0 < settings.pooled_fraction <= 1:
        yield f"patch_classifier.pooled_fraction must lie in (0, 1], got {settings.pooled_fraction}"
    if not settings.enabled and config.segment.mask_method == "cldf_plus":
        yield "segment.mask_method=cldf_plus needs patch_classifier.enabled=true"


def _label_tuning(config: Config) -> Iterator[str]:
    settings, end = config.label_tuning, config.diffusion.num_timesteps
    if not settings.enabled:
        return
    wanted = settings.timestep_range
    if len(wanted) != 2 or not 0 <= wanted[0] < wanted[1] <= end:
        yield (
            f"label_tuning.timestep_range must be two timesteps (low, high), 0 <= low < high <= {end}"
            f", got {list(wanted)}; label_tuning.enabled=false leaves the stage out"
        )
    if settings.fit.weight_decay:
        yield (
            "label_tuning.fit.weight_decay must be 0: it would change the embedding of 'no label "
            f"given', which is no part of the tuning; got {settings.fit.weight_decay}"
        )
    if settings.fit.compile or settings.fit.channels_last != "auto":
        yield (
            "label_tuning.fit.compile and .channels_last must stay false and auto: the diffusion "
            "model is frozen there, and not compiled"
        )


def _unconditional(config: Config) -> Iterator[str]:
    """What a diffusion model that never sees a label cannot do."""
    dropped, rows = config.diffusion.label_dropout, config.segment.methods
    if not 0 <= dropped <= 1:
        yield f"diffusion.label_dropout must lie in [0, 1], got {dropped}"
    asks = (
        config.features.condition != "none"
        or config.features.contrast
        or config.label_tuning.enabled
        or not rows
        or bool({"cdm", "cg_diff", "cg_cdm"} & set(rows))
    )
    if dropped == 1 and asks:
        yield (
            "diffusion.label_dropout=1 trains a model that never sees a label; it needs "
            "features.condition=none, features.contrast=false, label_tuning.enabled=false, and "
            "segment.methods without cdm, cg_diff and cg_cdm, e.g. segment.methods=[cldf]"
        )


def _noise_levels(config: Config) -> Iterator[str]:
    last = config.diffusion.num_timesteps - 1
    for path, levels in (
        ("features.timesteps", config.features.timesteps),
        ("gradient_map.timesteps", config.gradient_map.timesteps),
        ("saliency.timesteps", config.saliency.timesteps),
        ("classifier.max_timestep", (config.classifier.max_timestep,)),
    ):
        if not levels or any(not 0 <= level <= last for level in levels):
            yield f"{path} must be timesteps in 0..{last}, got {list(levels)}"
    asked = max(Saliency().timesteps)
    by_seeds = config.seeds.cam == "auto" and config.diffusion.label_dropout < 1
    if asked > last and (by_seeds or config.label_tuning.enabled):
        yield (
            f"seeds.cam=auto and label_tuning ask the diffusion model at timestep {asked}, "
            f"diffusion.num_timesteps is {last + 1}; set seeds.cam=gradcam_pp and "
            "label_tuning.enabled=false, or take more timesteps"
        )
    highest = max(config.gradient_map.timesteps, default=0)
    if highest >= config.classifier.max_timestep:
        yield (
            "gradient_map.timesteps must stay below classifier.max_timestep "
            f"({config.classifier.max_timestep}), noise that the classifier never saw in "
            f"training; got {highest}"
        )


def _counterfactuals(config: Config) -> Iterator[str]:
    """The rules of the rows cg_diff and cg_cdm, where they are on."""
    last = config.diffusion.num_timesteps - 1
    blind = config.classifier.max_timestep
    for path, row in (("cg_diff", config.cg_diff), ("cg_cdm", config.cg_cdm)):
        if not row.enabled:
            continue
        if not 1 <= row.timestep <= last:
            yield f"{path}.timestep must be a timestep in 1..{last}, got {row.timestep}"
        if not 1 <= row.steps <= row.timestep:
            yield (f"{path}.steps must lie in 1..{row.timestep} ({path}.timestep), got {row.steps}")
        if row.scale < 0:
            yield f"{path}.scale must be >= 0, got {row.scale}"
        if row.scale > 0 and row.timestep >= blind:
            yield (
                f"{path}.timestep must stay below classifier.max_timestep ({blind}), noise "
                f"that the classifier never saw in training, or {path}.scale be 0; "
                f"got {row.timestep}"
            )
    if config.cg_diff.label_scale < 0:
        yield f"cg_diff.label_scale must be >= 0, got {config.cg_diff.label_scale}"
    needs_plain = config.cg_diff.inversion or config.cg_diff.label_scale != 1
    if config.cg_diff.enabled and needs_plain and config.diffusion.label_dropout == 0:
        yield (
            "cg_diff.inversion and a cg_diff.label_scale other than 1 need a diffusion model that "
            "was trained without labels too: diffusion.label_dropout > 0, or "
            "cg_diff.inversion=false cg_diff.label_scale=1, or cg_diff.enabled=false"
        )
    if config.cg_cdm.enabled and not 0 <= config.cg_cdm.tau < 1:
        yield f"cg_cdm.tau must lie in [0, 1), got {config.cg_cdm.tau}"


def _taps(config: Config) -> Iterator[str]:
    taps, net = config.features.taps, config.diffusion.net
    if not taps:
        yield "features.taps must name at least one decoder level, e.g. [up2.1]"
    if len(set(taps)) != len(taps):
        yield f"features.taps must differ, got {list(taps)}"
    if config.features.noise == "none" and config.features.num_noise_samples != 1:
        yield f"features.num_noise_samples must be 1 with features.noise=none, got {config.features.num_noise_samples}"
    for tap in taps:
        if OTHER_TAP.fullmatch(tap):
            continue
        found = TAP.fullmatch(tap)
        level, block = (int(number) for number in found.groups()) if found else (-1, -1)
        if not (0 <= level < len(net.channels) and 0 <= block <= net.num_res_blocks):
            yield (
                f"features.taps must be up<level>.<block>, level 0 to {len(net.channels) - 1} and "
                f"block 0 to {net.num_res_blocks} with diffusion.net as it is, image<size> with "
                f"size 1, 3, 5, 7 or 9, or cam<layer> with layer 1 to 4, got {tap!r}"
            )


def _part(config: Config) -> Iterator[str]:
    part, found = config.cache.part, PART.fullmatch(config.cache.part)
    number, count = (int(word) for word in found.groups()) if found else (0, 0)
    if part and not 1 <= number <= count:
        yield f"cache.part must be i/n with 1 <= i <= n, such as 1/4, got {part!r}"
    if part and config.cache.verify:
        yield f"cache.verify=true looks at the whole cache; leave cache.part={part} out"


def _smoothing(config: Config) -> Iterator[str]:
    size = config.data.image_size
    for path, pixels in (
        ("gradient_map.smooth_pixels", config.gradient_map.smooth_pixels),
        ("saliency.smooth_pixels", config.saliency.smooth_pixels),
        ("cg_diff.smooth_pixels", config.cg_diff.smooth_pixels if config.cg_diff.enabled else 0),
        ("cg_cdm.smooth_pixels", config.cg_cdm.smooth_pixels if config.cg_cdm.enabled else 0),
    ):
        if pixels < 0 or 3 * pixels + 0.5 >= size:
            yield (
                f"{path} must be >= 0 and three times it fit into data.image_size ({size}), "
                f"got {pixels}"
            )


def _decoder(config: Config) -> Iterator[str]:
    contrast = config.decoder.contrast
    if contrast.temperature <= 0:
        yield f"decoder.contrast.temperature must be > 0, got {contrast.temperature}"
    if contrast.backend == "torch" and contrast.precision not in ("auto", "fp32"):
        yield (
            f"decoder.contrast.precision={contrast.precision} needs Triton's kernels; with "
            "decoder.contrast.backend=torch take auto or fp32"
        )
    plain = (contrast.backend, contrast.precision, contrast.deterministic) == (
        "auto",
        "auto",
        False,
    )
    if config.decoder.loss == "cross_entropy" and not plain:
        yield (
            "decoder.contrast.backend, .precision and .deterministic are of the contrastive loss; "
            "leave them out with decoder.loss=cross_entropy"
        )
    batch = config.decoder.fit.batch_size
    for name, parts in (("object_pixels", 1), ("background_pixels", 2)):
        pixels = getattr(contrast, name)
        if pixels < 1 or pixels % (batch * parts):
            yield (
                f"decoder.contrast.{name} must be a positive multiple of {batch * parts} "
                f"(decoder.fit.batch_size x {parts}), got {pixels}"
            )
    yield from _hard_negatives(contrast, contrast.background_pixels // (2 * batch))
    if config.decoder.fit.gradient_accumulation_steps != 1:
        yield (
            "decoder.fit.gradient_accumulation_steps must be 1, "
            f"got {config.decoder.fit.gradient_accumulation_steps}: it would change the negatives of the loss"
        )


def _hard_negatives(contrast: Contrast, per_slice: int) -> Iterator[str]:
    """The rules of hard negatives, with `per_slice` background pixels of each slice of a step."""
    share = contrast.hard_negatives
    if not 0 <= share <= 1:
        yield f"decoder.contrast.hard_negatives must lie in [0, 1], got {share}"
    elif share > 0 and round(share * per_slice) < 1:
        yield (
            f"decoder.contrast.hard_negatives must be 0 or make at least one of the {per_slice} "
            "background pixels that a step takes from a slice (decoder.contrast.background_pixels "
            f"/ decoder.fit.batch_size / 2), got {share}; take more of either"
        )
    if not 0 < contrast.hard_pool <= 1:
        yield f"decoder.contrast.hard_pool must lie in (0, 1], got {contrast.hard_pool}"


def _shares(config: Config) -> Iterator[str]:
    seeds = config.seeds
    if not 0 <= seeds.background_threshold < seeds.object_threshold <= 1:
        yield (
            "seeds must keep 0 <= background < foreground <= 1, "
            f"got {seeds.background_threshold} and {seeds.object_threshold}"
        )
    for path, share in (
        ("segment.negative_fraction", config.segment.negative_fraction),
        ("plus.negative_fraction", config.plus.negative_fraction),
        ("evaluate.confidence", config.evaluate.confidence),
    ):
        if not 0 < share < 1:
            yield f"{path} must lie in (0, 1), got {share}"
    for path, share in (
        ("classifier.clean_fraction", config.classifier.clean_fraction),
        ("segment.gate_probability", config.segment.gate_probability),
        ("plus.cam_threshold", config.plus.cam_threshold),
        ("patch_classifier.dropout", config.patch_classifier.dropout),
        ("patch_classifier.label_smoothing", config.patch_classifier.label_smoothing),
        ("decoder.dropout", config.decoder.dropout),
    ):
        if not 0 <= share < 1:
            yield f"{path} must lie in [0, 1), got {share}"
    if not -1 <= config.plus.min_agreement < 1:
        yield f"plus.min_agreement must lie in [-1, 1), got {config.plus.min_agreement}"
    if not config.segment.min_component_ml >= 0:
        yield f"segment.min_component_ml must be >= 0, got {config.segment.min_component_ml}"


def _rows(config: Config) -> Iterator[str]:
    rows = config.segment.methods
    for row in rows:
        if row not in ROWS:
            yield f"segment.methods must be of {', '.join(ROWS)}, got {row!r}"
    if len(set(rows)) != len(rows):
        yield f"segment.methods must differ, got {list(rows)}"
    if rows and config.segment.mask_method not in ("auto", *rows):
        yield (
            f"segment.methods must hold {config.segment.mask_method}, whose masks segment.mask_method asks "
            f"for, got {list(rows)}"
        )
    if rows and "cldf" not in rows:
        yield f"segment.methods must hold cldf, with which the others are compared, got {list(rows)}"
