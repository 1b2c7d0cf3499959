"""The rules that a configuration must keep, each with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from cldf_dist.config import Config, Fit, UNet

DATASETS = ("phantom", "brats")


def broken_rules(config: Config) -> list[str]:
    """One sentence for each rule that the configuration breaks."""
    broken = [
        *_choices(config),
        *_data(config),
        *_unet("diffusion.net", config.diffusion.net),
        *_levels(config),
        *_decoder(config),
        *_shares(config),
    ]
    for section in ("diffusion", "classifier", "cam", "decoder"):
        broken += _fit(f"{section}.fit", getattr(config, section).fit)
    return broken


def _choices(config: Config) -> Iterator[str]:
    for path, value, choices in (
        ("mixed_precision", config.mixed_precision, ("auto", "no", "bf16")),
        ("data.dataset", config.data.dataset, DATASETS),
        ("data.on_damaged", config.data.on_damaged, ("error", "skip")),
        ("diffusion.schedule", config.diffusion.schedule, ("cosine", "linear")),
        ("diffusion.prediction", config.diffusion.prediction, ("v_prediction", "epsilon")),
        ("diffusion.net.attention", config.diffusion.net.attention, ("sdpa", "xformers")),
        ("features.condition", config.features.condition, ("object", "no_object", "none")),
        ("seeds.rule", config.seeds.rule, ("both", "cam", "gradient")),
        ("cam.seed_method", config.cam.seed_method, ("gradcam", "gradcam_pp", "layercam")),
    ):
        if value not in choices:
            yield f"{path} must be one of {', '.join(choices)}, got {value!r}"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if any(part in ("", ".", "..") for part in config.name.split("/")) or "\\" in config.name:
        yield f"name must be a plain folder name, got {config.name!r}"
    if data.dataset != "phantom" and not data.root and not config.input:
        yield f"data.root must name the folder of the {data.dataset} data; add data.root=FOLDER"
    depth = 2 ** (len(config.diffusion.net.channels) - 1)
    if data.image_size < 16 or data.image_size % depth:
        yield (
            f"data.image_size must be at least 16 and a multiple of {depth} (the U-Net halves it "
            f"{len(config.diffusion.net.channels) - 1} times), got {data.image_size}"
        )
    if data.clip_low >= data.clip_high:
        yield f"data.clip_low must be < data.clip_high, got {data.clip_low} and {data.clip_high}"
    if data.validation_fraction <= 0 or data.test_fraction <= 0:
        yield "data.validation_fraction and data.test_fraction must be > 0"
    elif data.validation_fraction + data.test_fraction >= 1:
        yield "data.validation_fraction + data.test_fraction must stay below 1"
    for name in ("min_object_pixels", "slices_per_shard"):
        if getattr(data, name) < 1:
            yield f"data.{name} must be >= 1, got {getattr(data, name)}"


def _fit(path: str, fit: Fit) -> Iterator[str]:
    for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every"):
        if getattr(fit, name) < 1:
            yield f"{path}.{name} must be >= 1, got {getattr(fit, name)}"
    if fit.learning_rate <= 0:
        yield f"{path}.learning_rate must be > 0, got {fit.learning_rate}"
    if not 0 <= fit.average_decay < 1:
        yield f"{path}.average_decay must lie in [0, 1), got {fit.average_decay}"
    for name in ("warmup_steps", "weight_decay", "clip_norm", "num_workers", "validate_every"):
        if getattr(fit, name) < 0:
            yield f"{path}.{name} must be >= 0, got {getattr(fit, name)}"


def _unet(path: str, net: UNet) -> Iterator[str]:
    if len(net.channels) != len(net.attention_levels):
        yield (
            f"{path}.attention_levels needs one entry per level of {path}.channels "
            f"({len(net.channels)}), got {len(net.attention_levels)}"
        )
    for channels in net.channels:
        if channels % net.norm_num_groups:
            yield (
                f"{path}.channels must be multiples of {path}.norm_num_groups "
                f"({net.norm_num_groups}), got {channels}"
            )
    for channels, attends in zip(net.channels, net.attention_levels):
        if attends and channels % net.num_head_channels:
            yield (
                f"{path}.channels with attention must be multiples of {path}.num_head_channels "
                f"({net.num_head_channels}), got {channels}"
            )


def _levels(config: Config) -> Iterator[str]:
    last = config.diffusion.num_timesteps - 1
    for path, levels in (
        ("features.noise_levels", config.features.noise_levels),
        ("gradient_map.noise_levels", config.gradient_map.noise_levels),
        ("saliency.noise_levels", config.saliency.noise_levels),
        ("classifier.max_noise_level", (config.classifier.max_noise_level,)),
    ):
        if not levels or any(not 0 <= level <= last for level in levels):
            yield f"{path} must be timesteps in 0..{last}, got {list(levels)}"
    if not config.features.taps:
        yield "features.taps must name at least one decoder level, e.g. [up2.1]"


def _decoder(config: Config) -> Iterator[str]:
    contrast = config.decoder.contrast
    if contrast.temperature <= 0:
        yield f"decoder.contrast.temperature must be > 0, got {contrast.temperature}"
    batch = config.decoder.fit.batch_size
    for name, parts in (("foreground_pixels", 1), ("background_pixels", 2)):
        pixels = getattr(contrast, name)
        if pixels < 1 or pixels % (batch * parts):
            yield (
                f"decoder.contrast.{name} must be a positive multiple of {batch * parts} "
                f"(decoder.fit.batch_size x {parts}), got {pixels}"
            )
    if config.decoder.fit.accumulate != 1:
        yield (
            "decoder.fit.accumulate must be 1, "
            f"got {config.decoder.fit.accumulate}: it would change the negatives of the loss"
        )


def _shares(config: Config) -> Iterator[str]:
    seeds = config.seeds
    if not 0 <= seeds.background < seeds.foreground <= 1:
        yield (
            "seeds must keep 0 <= background < foreground <= 1, "
            f"got {seeds.background} and {seeds.foreground}"
        )
    for path, share in (
        ("segment.negative_fraction", config.segment.negative_fraction),
        ("evaluate.confidence", config.evaluate.confidence),
    ):
        if not 0 < share < 1:
            yield f"{path} must lie in (0, 1), got {share}"
    for path, share in (
        ("diffusion.label_dropout", config.diffusion.label_dropout),
        ("classifier.clean_share", config.classifier.clean_share),
        ("segment.gate_probability", config.segment.gate_probability),
        ("decoder.dropout", config.decoder.dropout),
    ):
        if not 0 <= share < 1:
            yield f"{path} must lie in [0, 1), got {share}"
