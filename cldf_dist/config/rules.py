"""Rules between settings: a function each, which yields a sentence (path, rule, value) if broken.

A rule may meet values that break their own bounds: all mistakes are told at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cldf_dist.config.data import CHAOS_OBJECTS, EACH, OBJECTS
from cldf_dist.config.fields import broken_bounds
from cldf_dist.config.method import Saliency
from cldf_dist.config.nets import Classifier, UNet
from cldf_dist.config.schema import FITTED, Config
from cldf_dist.methods import CLDF, scored_names

PART = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")
TAP = re.compile(r"up(\d+)\.(\d+)")
OTHER_TAP = re.compile(r"image[13579]|cam[1234]")  # as in method/features.py, which imports torch


def check(config: Config) -> None:
    """Raise ValueError with a sentence for each broken bound, choice and rule."""
    rules = (
        _names, _data, _shards, _object, _nets, _patch_classifier, _label_tuning, _unconditional,
        _timesteps, _counterfactuals, _smoothing, _taps, _part, _seeds, _contrast, _decoder,
        _validation_samples, _methods,
    )  # fmt: skip
    broken = [*broken_bounds(config), *(said for rule in rules for said in rule(config))]
    if broken:
        raise ValueError("; ".join(broken))


def _names(config: Config) -> Iterator[str]:
    data = config.data
    if any(part in ("", ".", "..") for part in config.name.split("/")) or "\\" in config.name:
        yield f"name must be a plain folder name, got {config.name!r}"
    if data.dataset != "phantom" and not (data.root or data.shards or config.input):
        yield f"data.root must name the folder of the {data.dataset} data; add data.root=FOLDER"
    if data.dataset == "dicom" and not (data.labels or data.shards or config.input):
        yield "data.labels must name the CSV file of labels for data.dataset=dicom"
    if data.labels and data.dataset not in ("nnunet", "dicom"):
        yield (
            f"data.labels is for data.dataset=nnunet and dicom; {data.dataset} has its labels from "
            f"its masks: leave it out, got {data.labels!r}"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    depth = 2 ** max(len(config.diffusion.net.channels) - 1, 0)  # the U-Net halves it each time
    if data.image_size % depth:
        yield f"data.image_size must be a multiple of {depth} for this U-Net, got {data.image_size}"
    if data.window and (len(data.window) != 2 or data.window[0] >= data.window[1]):
        yield f"data.window must be empty or (low, high) with low < high, got {list(data.window)}"
    if data.clip_low >= data.clip_high:
        yield f"data.clip_low must be < data.clip_high, got {data.clip_low} and {data.clip_high}"
    held_out = data.validation_fraction + data.test_fraction
    if held_out >= 1:
        yield f"data.validation_fraction + data.test_fraction must stay below 1, got {held_out:g}"


def _shards(config: Config) -> Iterator[str]:
    """The rules of remote shards."""
    data = config.data
    if not data.shards:
        return
    if "://" not in data.shards:
        yield f"data.shards must be a URL, such as s3://bucket/x or file:///x, got {data.shards!r}"
    if data.object == EACH or "," in data.object:
        yield f"data.shards holds the slices of one object; make a run of each of {data.object!r}"
    if data.labels:
        yield f"data.labels: data.shards come with their labels; leave it out, got {data.labels!r}"


def _object(config: Config) -> Iterator[str]:
    """The rules of data.object that need no look at the data."""
    data = config.data
    names = data.object.split(",") if data.object not in ("", EACH) else []
    parts = [part for name in names for part in name.strip().split("+")]
    is_chaos = data.dataset == "chaos"
    known = CHAOS_OBJECTS.get(data.modality) if is_chaos else OBJECTS.get(data.dataset)
    for part in parts:
        if known is not None and part not in known:
            yield (
                f"data.object must be of {', '.join(known)} for data.dataset={data.dataset}"
                + (f" and data.modality={data.modality}" if is_chaos else "")
                + f", joined by + for one object or by a comma for several; got {part!r}"
            )
    if len(set(parts)) != len(parts) or not all(parts):
        yield f"data.object must name different objects, got {data.object!r}"


def _nets(config: Config) -> Iterator[str]:
    yield from _levels("diffusion.net", config.diffusion.net, middle_attends=True)
    yield from _levels("classifier", config.classifier, middle_attends=False)


def _levels(path: str, net: UNet | Classifier, *, middle_attends: bool) -> Iterator[str]:
    """The rules of a diffusion network; its middle block may attend whatever the levels say."""
    if not net.channels:
        yield f"{path}.channels must have at least one level, e.g. [64, 128]"
        return
    num_levels, given = len(net.channels), len(net.attention_levels)
    if given != num_levels:
        yield f"{path}.attention_levels needs one entry per level ({num_levels}), got {given}"
    if net.norm_num_groups < 1 or net.num_head_channels < 1:
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


def _patch_classifier(config: Config) -> Iterator[str]:
    downsample, size = config.patch_classifier.downsample, config.data.image_size
    if downsample >= 1 and size % downsample:
        yield f"patch_classifier.downsample must divide data.image_size ({size}), got {downsample}"
    if not config.patch_classifier.enabled and config.segment.mask_method == "cldf_plus":
        yield "segment.mask_method=cldf_plus needs patch_classifier.enabled=true"


def _label_tuning(config: Config) -> Iterator[str]:
    settings, end = config.label_tuning, config.diffusion.num_timesteps
    if not settings.enabled:
        return
    wanted = settings.timestep_range
    if len(wanted) != 2 or not 0 <= wanted[0] < wanted[1] <= end:
        yield (
            "label_tuning.timestep_range must be two timesteps (low, high), 0 <= low < high <= "
            f"{end}, got {list(wanted)}; label_tuning.enabled=false leaves the stage out"
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
    """The rules of a diffusion model that never sees a label."""
    asked = config.segment.methods
    asks = (
        config.features.condition != "none"
        or config.features.contrast
        or config.label_tuning.enabled
        or not asked
        or bool({"cdm", "cg_diff", "cg_cdm"} & set(asked))
    )
    if config.diffusion.label_dropout == 1 and asks:
        yield (
            "diffusion.label_dropout=1 trains a model that never sees a label; it needs "
            "features.condition=none, features.contrast=false, label_tuning.enabled=false, and "
            "segment.methods without cdm, cg_diff and cg_cdm, e.g. segment.methods=[cldf]"
        )


def _timesteps(config: Config) -> Iterator[str]:
    last, seen = config.diffusion.num_timesteps - 1, config.classifier.max_timestep
    for path, levels in (
        ("features.timesteps", config.features.timesteps),
        ("gradient_map.timesteps", config.gradient_map.timesteps),
        ("saliency.timesteps", config.saliency.timesteps),
        ("classifier.max_timestep", (seen,)),
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
    if highest >= seen:
        yield (
            f"gradient_map.timesteps must stay below classifier.max_timestep ({seen}), noise "
            f"that the classifier never saw in training; got {highest}"
        )


def _counterfactuals(config: Config) -> Iterator[str]:
    """The rules of the methods cg_diff and cg_cdm, where they are on."""
    last, seen = config.diffusion.num_timesteps - 1, config.classifier.max_timestep
    for path, settings in (("cg_diff", config.cg_diff), ("cg_cdm", config.cg_cdm)):
        if not settings.enabled:
            continue
        level, steps = settings.timestep, settings.steps
        if not 1 <= level <= last:
            yield f"{path}.timestep must be a timestep in 1..{last}, got {level}"
        if not 1 <= steps <= level:
            yield f"{path}.steps must lie in 1..{level} ({path}.timestep), got {steps}"
        if settings.scale > 0 and level >= seen:
            yield (
                f"{path}.timestep must stay below classifier.max_timestep ({seen}), noise "
                f"that the classifier never saw in training, or {path}.scale be 0; got {level}"
            )
    needs_plain = config.cg_diff.inversion or config.cg_diff.label_scale != 1
    if config.cg_diff.enabled and needs_plain and config.diffusion.label_dropout == 0:
        yield (
            "cg_diff.inversion and a cg_diff.label_scale other than 1 need a diffusion model that "
            "was trained without labels too: diffusion.label_dropout > 0, or "
            "cg_diff.inversion=false cg_diff.label_scale=1, or cg_diff.enabled=false"
        )


def _smoothing(config: Config) -> Iterator[str]:
    size = config.data.image_size
    for path in ("gradient_map", "saliency", "cg_diff", "cg_cdm"):
        section = getattr(config, path)
        pixels, is_on = section.smooth_pixels, getattr(section, "enabled", True)
        if is_on and 3 * pixels + 0.5 >= size:
            yield f"{path}.smooth_pixels must fit three times into {size} pixels, got {pixels}"


def _taps(config: Config) -> Iterator[str]:
    taps, net = config.features.taps, config.diffusion.net
    if not taps:
        yield "features.taps must name at least one decoder level, e.g. [up2.1]"
    if len(set(taps)) != len(taps):
        yield f"features.taps must differ, got {list(taps)}"
    if config.features.noise == "none" and config.features.num_noise_samples != 1:
        samples = config.features.num_noise_samples
        yield f"features.num_noise_samples must be 1 with features.noise=none, got {samples}"
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


def _seeds(config: Config) -> Iterator[str]:
    low, high = config.seeds.background_threshold, config.seeds.object_threshold
    if not 0 <= low < high <= 1:
        rule = "0 <= background_threshold < object_threshold <= 1"
        yield f"seeds must keep {rule}, got {low} and {high}"


def _contrast(config: Config) -> Iterator[str]:
    contrast, batch = config.decoder.contrast, max(config.decoder.fit.batch_size, 1)
    for name, parts in (("object_pixels", 1), ("background_pixels", 2)):
        pixels = getattr(contrast, name)
        if pixels < 1 or pixels % (batch * parts):
            yield (
                f"decoder.contrast.{name} must be a positive multiple of {batch * parts} "
                f"(decoder.fit.batch_size x {parts}), got {pixels}"
            )
    share, per_slice = contrast.hard_negatives, contrast.background_pixels // (2 * batch)
    if 0 < share <= 1 and round(share * per_slice) < 1:
        yield (
            f"decoder.contrast.hard_negatives must be 0 or make at least one of the {per_slice} "
            "background pixels that a step takes from a slice (decoder.contrast.background_pixels "
            f"/ decoder.fit.batch_size / 2), got {share}; take more of either"
        )


def _decoder(config: Config) -> Iterator[str]:
    contrast = config.decoder.contrast
    if contrast.backend == "torch" and contrast.precision not in ("auto", "fp32"):
        given = contrast.precision
        yield f"decoder.contrast.precision must be auto or fp32 with .backend=torch, got {given!r}"
    is_set = contrast.deterministic or (contrast.backend, contrast.precision) != ("auto", "auto")
    if config.decoder.loss == "cross_entropy" and is_set:
        yield (
            "decoder.contrast.backend, .precision and .deterministic are of the contrastive loss; "
            "leave them out with decoder.loss=cross_entropy"
        )
    parts = config.decoder.fit.gradient_accumulation_steps
    if parts != 1:
        yield (
            f"decoder.fit.gradient_accumulation_steps must be 1, got {parts}: it would change the "
            "negatives of the loss"
        )


def _validation_samples(config: Config) -> Iterator[str]:
    for section in FITTED:
        path, fit = f"{section}.fit", getattr(config, section).fit
        if fit.validate_every > 0 and fit.validation_samples < 1:
            yield (
                f"{path}.validation_samples must be >= 1 where {path}.validate_every is not 0, "
                f"got {fit.validation_samples}"
            )


def _methods(config: Config) -> Iterator[str]:
    asked, mask_method = config.segment.methods, config.segment.mask_method
    for name in asked:
        if name not in scored_names():
            yield f"segment.methods must be of {', '.join(scored_names())}, got {name!r}"
    said = f"got {list(asked)}"
    if len(set(asked)) != len(asked):
        yield f"segment.methods must differ, {said}"
    if asked and mask_method not in ("auto", *asked):
        yield f"segment.methods must hold {mask_method}, as segment.mask_method asks, {said}"
    if asked and CLDF not in asked:
        yield f"segment.methods must hold {CLDF}, with which the others are compared, {said}"
