"""Promises of `check`: each broken bound, choice and rule is told with key, rule and value."""

from typing import Any

import pytest

from cldf_dist.config import Config, Contrast, Data, Decoder, Fit, check, from_plain, to_plain

COUNTS = (
    "gradient_map.num_noise_samples", "features.num_noise_samples", "saliency.num_noise_samples",
    "cache.batch_size",
    "cache.slices_per_shard", "cache.verify_processes", "segment.batch_size",
    "segment.tile_pixels", "evaluate.resamples",
    "report.slices_per_patient", "decoder.hidden", "decoder.embedding", "decoder.prototype_pixels",
    "decoder.prototypes_per_class", "decoder.fit.batch_size",
    "diffusion.num_timesteps", "data.min_object_pixels", "data.slices_per_shard",
    "label_tuning.compared_slices", "patch_classifier.channels", "patch_classifier.layers",
    "patch_classifier.downsample",
)  # fmt: skip


def changed(config: Config, path: str, value: Any) -> Config:
    """The configuration with one leaf replaced, unchecked."""
    plain = to_plain(config)
    *sections, leaf = path.split(".")
    section = plain
    for name in sections:
        section = section[name]
    section[leaf] = value
    return from_plain(plain)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("mixed_precision", "fp8", r"must be one of auto, no, bf16, fp16, got 'fp8'"),
        ("data.dataset", "acdc", r"data\.dataset must be one of .*phantom.*, got 'acdc'"),
        ("name", "../elsewhere", r"name must be a plain folder name"),
        ("data.image_size", 100, r"image_size must be a multiple of 8 .* U-Net, got 100"),
        ("data.image_size", 8, r"data\.image_size must lie in \[16, 4096\], got 8"),
        ("data.image_size", 8192, r"data\.image_size must lie in \[16, 4096\], got 8192"),
        ("data.window", [3.0, 1.0], r"data\.window must be empty or \(low, high\)"),
        ("data.test_fraction", 0.0, r"data\.test_fraction must be > 0, got 0\.0"),
        ("data.clip_low", 9.0, r"data\.clip_low must be < data\.clip_high, got 9\.0 and 5\.5"),
        ("data.test_fraction", 0.9, r"must stay below 1"),
        ("data.slices_per_shard", 0, r"data\.slices_per_shard must be >= 1, got 0"),
        ("diffusion.fit.steps", 0, r"diffusion\.fit\.steps must be >= 1, got 0"),
        ("cam.fit.learning_rate", 0.0, r"cam\.fit\.learning_rate must be > 0, got 0\.0"),
        ("classifier.fit.ema_decay", 1.0, r"classifier\.fit\.ema_decay must lie in"),
        ("decoder.fit.clip_norm", -1.0, r"decoder\.fit\.clip_norm must be >= 0"),
        ("diffusion.net.channels", [64, 64], r"attention_levels needs one entry per level"),
        ("diffusion.net.norm_num_groups", 48, r"multiples of diffusion.*norm_num_groups \(48\)"),
        ("diffusion.net.num_head_channels", 96, r"net\.num_head_channels \(96\), got 256"),
        ("features.noise", "some", r"features\.noise must be one of drawn, none, got 'some'"),
        ("features.timesteps", [1000], r"features\.timesteps must be timesteps in 0\.\.999"),
        ("saliency.timesteps", [], r"saliency\.timesteps must be timesteps"),
        ("features.taps", [], r"features\.taps must name at least one"),
        ("decoder.contrast.temperature", -0.1, r"temperature must be > 0, got -0\.1"),
        ("decoder.contrast.background_pixels", 96, r"must be a positive multiple of 64"),
        ("decoder.contrast.object_pixels", 300, r"a positive multiple of 32 .*got 300"),
        ("decoder.contrast.object_pixels", 0, r"a positive multiple of 32 .*got 0"),
        ("decoder.contrast.hard_negatives", 1.5, r"hard_negatives must lie in \[0, 1\], got 1\.5"),
        ("decoder.contrast.hard_negatives", 0.05, r"one of the 6 background pixels .*got 0\.05"),
        ("decoder.contrast.hard_pool", 0.0, r"hard_pool must lie in \(0, 1\], got 0\.0"),
        ("decoder.fit.gradient_accumulation_steps", 2, r"steps must be 1, got 2"),
        ("seeds.background_threshold", 0.6, r"< object_threshold <= 1, got 0\.6 and 0\.5"),
        ("segment.methods", ["cldf", "cldf_best"], r"must be of gradcam, .*, got 'cldf_best'"),
        ("segment.methods", ["gradcam"], r"segment\.methods must hold cldf"),
        ("segment.methods", ["cldf", "cldf"], r"segment\.methods must differ"),
        ("segment.mask_method", "best", r"must be one of auto, cldf, cldf_plus, got 'best'"),
        ("patch_classifier.downsample", 3, r"must divide data\.image_size \(128\), got 3"),
        ("patch_classifier.pooled_fraction", 0.0, r"fraction must lie in \(0, 1\], got 0\.0"),
        ("patch_classifier.pooled_fraction", 1.5, r"fraction must lie in \(0, 1\], got 1\.5"),
        ("patch_classifier.dropout", 1.0, r"classifier\.dropout must lie in \[0, 1\), got 1"),
        ("patch_classifier.label_smoothing", -0.1, r"label_smoothing must lie in .*got -0\.1"),
        ("patch_classifier.fit.steps", 0, r"patch_classifier\.fit\.steps must be >= 1, got 0"),
        ("plus.negative_fraction", 0.0, r"plus\.negative_fraction must lie in \(0, 1\), got 0\.0"),
        ("plus.min_agreement", 1.0, r"plus\.min_agreement must lie in \[-1, 1\), got 1\.0"),
        ("plus.negative_fraction", 1.0, r"plus\.negative_fraction must lie in \(0, 1\), got 1\.0"),
        ("segment.negative_fraction", 0.0, r"must lie in \(0, 1\), got 0\.0"),
        ("diffusion.label_dropout", 1.1, r"label_dropout must lie in \[0, 1\], got 1\.1"),
        ("diffusion.label_dropout", 1.0, r"label_dropout=1 .* features\.condition=none, .* seg"),
        ("label_tuning.timestep_range", [600, 50], r"0 <= low < high <= 1000, got \[600, 50\]"),
        ("label_tuning.fit.compile", True, r"label_tuning\.fit\.compile and .* must stay false"),
        ("label_tuning.fit.weight_decay", 0.1, r"weight_decay must be 0: .* got 0\.1"),
        ("label_tuning.compared_slices", 0, r"label_tuning\.compared_slices must be >= 1, got 0"),
        ("label_tuning.fit.steps", 0, r"label_tuning\.fit\.steps must be >= 1, got 0"),
        ("decoder.loss", "hinge", r"decoder\.loss must be one of contrastive, cross_entropy, got"),
        ("decoder.prototypes_per_class", 0, r"prototypes_per_class must be >= 1, got 0"),
        ("diffusion.net.channels", [], r"diffusion\.net\.channels must have at least one level"),
        ("diffusion.net.channels", [0, 0, 0, 0], r"diffusion\.net\.channels must be positive mult"),
        ("diffusion.net.norm_num_groups", 0, r"net\.norm_num_groups must be >= 1, got 0"),
        ("classifier.num_res_blocks", 0, r"classifier\.num_res_blocks must be >= 1, got 0"),
        ("classifier.channels", [32, 64], r"classifier\.attention_levels needs one entry"),
        ("classifier.norm_num_groups", 48, r"multiples of classifier\.norm_num_groups \(48\)"),
        ("cam.layer", "layer5", r"cam\.layer must be one of layer1, .*, layer4, got 'layer5'"),
        ("cam.channels", [32, 64, 128], r"cam\.channels must have 4 entries, got \[32, 64"),
        ("cam.channels", [8, 64, 128, 256], r"cam\.channels\[0\] must be >= 16, got 8"),
        ("cam.channels", [20, 64, 128, 256], r"cam\.channels\[0\] must be a multiple of 8, got 20"),
        ("cam.blocks", [1, 1, 1, 0], r"cam\.blocks\[3\] must be >= 1, got 0"),
        ("features.taps", ["up4.1"], r"level 0 to 3 and block 0 to 2 .*, got 'up4\.1'"),
        ("features.taps", ["up2.3"], r"level 0 to 3 and block 0 to 2 .*, got 'up2\.3'"),
        ("features.taps", ["down1.1"], r"features\.taps must be up<level>\.<block>.*got 'down1"),
        ("features.taps", ["image4"], r"size 1, 3, 5, 7 or 9, or cam<layer> .* got 'image4'"),
        ("features.taps", ["cam5"], r"or cam<layer> with layer 1 to 4, got 'cam5'"),
        ("features.taps", ["up1.1", "up1.1"], r"features\.taps must differ"),
        ("classifier.max_timestep", 250, r"must stay below classifier\.max_timestep \(250\)"),
        ("gradient_map.smooth_pixels", -1.0, r"gradient_map\.smooth_pixels must be >= 0, got -1"),
        ("saliency.smooth_pixels", 43.0, r"saliency\.smooth_pixels .* into 128 pixels, got 43"),
        ("cam.fit.validation_samples", 0, r"cam\.fit\.validation_samples must be >= 1 where"),
        ("data.phantom.num_patients", 2, r"data\.phantom\.num_patients must be >= 3, got 2"),
        ("data.phantom.num_slices", 3, r"data\.phantom\.num_slices must be >= 4, got 3"),
    ],
)  # fmt: skip
def test_broken_rules_name_key_rule_and_value(path: str, value: Any, rule: str) -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    check(sound)
    with pytest.raises(ValueError, match=rule):
        check(changed(sound, path, value))


@pytest.mark.parametrize("path", COUNTS)
def test_counts_are_at_least_one(path: str) -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    with pytest.raises(ValueError, match=rf"{path} must be >= 1, got 0"):
        check(changed(sound, path, 0))


def test_masks_are_of_a_row_that_the_run_has() -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    plus = changed(sound, "segment.mask_method", "cldf_plus")
    check(plus)
    check(changed(sound, "patch_classifier.enabled", False))
    with pytest.raises(ValueError, match=r"mask_method=cldf_plus needs patch_classifier\.enabled="):
        check(changed(plus, "patch_classifier.enabled", False))
    check(changed(plus, "segment.methods", ["cldf", "cldf_plus"]))
    with pytest.raises(ValueError, match=r"segment\.methods must hold cldf_plus, .*got \['cldf'\]"):
        check(changed(plus, "segment.methods", ["cldf"]))


def test_the_rules_of_a_net_are_those_of_its_builder() -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    attends = changed(sound, "classifier.attention_levels", [False, False, True, True])
    check(attends)  # 96 and 128 channels in heads of 32
    with pytest.raises(ValueError, match=r"classifier\.channels with attention .*\(36\).* got 96"):
        check(changed(attends, "classifier.num_head_channels", 36))
    check(changed(attends, "classifier.num_head_channels", 256))  # one head of all channels
    no_attention = changed(sound, "diffusion.net.attention_levels", [False] * 4)
    with pytest.raises(ValueError, match=r"\(48\), got 256"):  # the middle block attends
        check(changed(no_attention, "diffusion.net.num_head_channels", 48))


def test_validation_needs_no_samples_where_there_is_none() -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    silent = changed(sound, "cam.fit.validate_every", 0)
    check(changed(silent, "cam.fit.validation_samples", 0))


def test_sizes_of_the_phantom_matter_where_it_is_used() -> None:
    other = Config(name="brats", data=Data(dataset="brats", root="/data"))
    check(changed(other, "data.phantom.num_patients", 0))


def test_native_data_needs_its_folder() -> None:
    with pytest.raises(ValueError, match=r"data\.root must name the folder of the brats data"):
        check(Config(name="brats"))


def test_all_broken_rules_are_told_at_once() -> None:
    broken = Config(
        name="x",
        data=Data(dataset="phantom"),
        decoder=Decoder(
            contrast=Contrast(temperature=0.0), fit=Fit(batch_size=32, keep_checkpoints=0)
        ),
    )
    with pytest.raises(
        ValueError, match=r"temperature must be > 0.*decoder\.fit\.keep_checkpoints must be >= 1"
    ):
        check(broken)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("cg_diff.timestep", 0, r"cg_diff\.timestep must be a timestep in 1\.\.999, got 0"),
        ("cg_cdm.timestep", 1000, r"cg_cdm\.timestep must be a timestep in 1\.\.999"),
        (
            "cg_diff.steps",
            251,
            r"cg_diff\.steps must lie in 1\.\.250 \(cg_diff\.timestep\), got",
        ),
        ("cg_cdm.steps", 0, r"cg_cdm\.steps must lie in 1\.\.250 \(cg_cdm\.timestep\), got 0"),
        ("cg_diff.scale", -1.0, r"cg_diff\.scale must be >= 0, got -1\.0"),
        (
            "cg_cdm.timestep",
            300,
            r"cg_cdm\.timestep must stay below classifier\.max_timestep",
        ),
        ("cg_cdm.tau", 1.0, r"cg_cdm\.tau must lie in \[0, 1\), got 1\.0"),
        ("cg_cdm.smooth_pixels", 43.0, r"cg_cdm\.smooth_pixels must fit three times .* got 43\.0"),
        (
            "diffusion.label_dropout",
            0.0,
            r"cg_diff\.inversion .* need .* diffusion\.label_dropout >",
        ),
    ],
)
def test_counterfactual_rows_keep_their_rules_where_they_are_on(
    path: str, value: Any, rule: str
) -> None:
    broken = changed(Config(name="sound", data=Data(dataset="phantom")), path, value)
    with pytest.raises(ValueError, match=rule):
        check(broken)
    for row in ("cg_diff", "cg_cdm"):
        broken = changed(broken, f"{row}.enabled", False)
    check(broken)


def test_saliency_that_chooses_must_lie_in_the_chain() -> None:
    few = Config(name="few", data=Data(dataset="phantom"))
    for path, value in (
        ("diffusion.num_timesteps", 340),
        ("saliency.timesteps", (100,)),
        ("label_tuning.enabled", False),
    ):
        few = changed(few, path, value)
    with pytest.raises(ValueError, match="ask the diffusion model at timestep 350"):
        check(few)
    check(changed(few, "seeds.cam", "gradcam_pp"))


def test_without_guidance_the_nets_need_not_know_what_it_asks() -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    check(changed(changed(sound, "cg_diff.timestep", 818), "cg_diff.scale", 0.0))
    by_label = changed(changed(sound, "cg_diff.inversion", False), "cg_diff.label_scale", 1.0)
    check(changed(by_label, "diffusion.label_dropout", 0.0))
