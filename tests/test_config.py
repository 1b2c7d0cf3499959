import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from cldf_dist.config import (
    Config,
    Contrast,
    Data,
    Decoder,
    Fit,
    UNet,
    build_section,
    check,
    flatten,
    from_plain,
    load,
    to_plain,
    to_yaml,
)
from cldf_dist.config_rules import COUNTS
from cldf_dist.method_rules import CAM_CHANNELS
from cldf_dist.nets.classifiers import MIN_CHANNELS, NORM_GROUPS
from cldf_dist.stages import STAGES

PHANTOM = {"data": {"dataset": "phantom"}}

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")


def write(folder: Path, name: str, settings: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def phantom(tmp_path: Path) -> str:
    return write(tmp_path, "phantom", PHANTOM)


def changed(config: Config, path: str, value: Any) -> Config:
    """The configuration with one leaf replaced, unchecked."""
    plain = to_plain(config)
    *sections, leaf = path.split(".")
    section = plain
    for name in sections:
        section = section[name]
    section[leaf] = value
    return from_plain(plain)


def test_words_override_files_and_later_files_override_earlier_ones(tmp_path: Path) -> None:
    first = write(
        tmp_path, "first", {**PHANTOM, "seed": 1, "cam": {"dropout": 0.3, "layer": "layer3"}}
    )
    second = write(tmp_path, "second", {"seed": 2, "cam": {"dropout": 0.4}})
    assert load([first]).seed == 1
    config = load([first, second], ["cam.dropout=0.5"])
    assert (config.seed, config.cam.dropout, config.cam.layer) == (2, 0.5, "layer3")
    assert config.diffusion == Config().diffusion, "what no file mentions keeps its default"


def test_name_is_the_stems_unless_it_is_given(tmp_path: Path, phantom: str) -> None:
    small = write(tmp_path, "small", {})
    assert load([phantom, small]).name == "phantom-small"
    assert load([phantom], ["name=mine"]).name == "mine"
    assert load([phantom], ["runs=/somewhere"]).run_folder == Path("/somewhere/phantom")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("diffusion.fit.stepz=3", r"diffusion\.fit\.stepz; did you mean diffusion\.fit\.steps\?"),
        ("decoder.contrast.temprature=1", r"did you mean decoder\.contrast\.temperature\?"),
        ("dtaa.root=x", r"unknown config key dtaa; did you mean data\?"),
        ("segment.qqqq=1", r"unknown config key segment\.qqqq; known: batch_size, "),
    ],
)
def test_a_typo_names_its_full_path_and_the_near_key(phantom: str, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load([phantom], [word])


def test_a_typo_in_a_file_is_found_too(tmp_path: Path) -> None:
    path = write(tmp_path, "typo", {**PHANTOM, "features": {"timestep": [3]}})
    with pytest.raises(ValueError, match=r"features\.timestep; did you mean features\.timesteps"):
        load([path])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=many", r"seed must be int, got 'many'"),
        ("seed=1.5", r"seed must be int, got 1\.5"),
        ("seed=true", r"seed must be int, got True"),
        ("tracking.enabled=1", r"tracking\.enabled must be bool, got 1"),
        ("cam.dropout=high", r"cam\.dropout must be float, got 'high'"),
        ("features.taps=up0.1", r"features\.taps must be a list of str, got 'up0\.1'"),
        ("features.timesteps=[10,ten]", r"features\.timesteps\[1\] must be int, got 'ten'"),
        ("cam=3", r"cam must hold keys, got 3"),
    ],
)
def test_a_wrong_type_names_key_and_value(phantom: str, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load([phantom], [word])


def test_numbers_are_taken_as_yaml_and_people_write_them(phantom: str) -> None:
    config = load([phantom], ["cam.fit.learning_rate=1e-4", "cam.dropout=0", "name=3"])
    assert config.cam.fit.learning_rate == 1e-4
    assert type(config.cam.dropout) is float
    assert config.name == "3"
    assert load([phantom], ["features.timesteps=[7]"]).features.timesteps == (7,)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("mixed_precision", "fp8", r"must be one of auto, no, bf16, fp16, got 'fp8'"),
        ("data.dataset", "acdc", r"data\.dataset must be one of .*phantom.*, got 'acdc'"),
        ("name", "../elsewhere", r"name must be a plain folder name"),
        ("data.image_size", 100, r"image_size must be at least 16 and a multiple of 8 .*got 100"),
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
        ("decoder.fit.gradient_accumulation_steps", 2, r"decoder\.fit\.accumulate must be 1, got 2"),
        ("seeds.background_threshold", 0.6, r"0 <= background < foreground <= 1, got 0\.6 and 0\.5"),
        ("segment.methods", ["cldf", "cldf_best"], r"must be of gradcam, .*, got 'cldf_best'"),
        ("segment.methods", ["gradcam"], r"segment\.rows must hold cldf"),
        ("segment.methods", ["cldf", "cldf"], r"segment\.rows must differ"),
        ("segment.mask_method", "best", r"mask_method must be one of auto, cldf, cldf_plus, got 'best'"),
        ("patch_classifier.downsample", 3, r"must divide data\.image_size \(128\), got 3"),
        ("patch_classifier.pooled_fraction", 0.0, r"pooled_fraction must lie in \(0, 1\], got 0\.0"),
        ("patch_classifier.pooled_fraction", 1.5, r"pooled_fraction must lie in \(0, 1\], got 1\.5"),
        ("patch_classifier.dropout", 1.0, r"classifier\.dropout must lie in \[0, 1\), got 1"),
        ("patch_classifier.label_smoothing", -0.1, r"label_smoothing must lie in .*got -0\.1"),
        ("patch_classifier.fit.steps", 0, r"patch_classifier\.fit\.steps must be >= 1, got 0"),
        ("plus.negative_fraction", 0.0, r"plus\.foreground must lie in \(0, 1\), got 0\.0"),
        ("plus.min_agreement", 1.0, r"plus\.agreement must lie in \[-1, 1\), got 1\.0"),
        ("plus.negative_fraction", 1.0, r"plus\.foreground must lie in \(0, 1\), got 1\.0"),
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
        ("cam.channels", [32, 64, 128], r"cam\.channels must be four multiples of 8"),
        ("cam.channels", [8, 64, 128, 256], r"must be four .*got \[8, 64, 128, 256\]"),
        ("cam.channels", [20, 64, 128, 256], r"cam\.channels must be four multiples of 8"),
        ("cam.blocks", [1, 1, 1, 0], r"cam\.blocks must be four numbers >= 1, got \[1, 1, 1, 0\]"),
        ("features.taps", ["up4.1"], r"level 0 to 3 and block 0 to 2 .*, got 'up4\.1'"),
        ("features.taps", ["up2.3"], r"level 0 to 3 and block 0 to 2 .*, got 'up2\.3'"),
        ("features.taps", ["down1.1"], r"features\.taps must be up<level>\.<block>.*got 'down1"),
        ("features.taps", ["image4"], r"size 1, 3, 5, 7 or 9, or cam<layer> .* got 'image4'"),
        ("features.taps", ["cam5"], r"or cam<layer> with layer 1 to 4, got 'cam5'"),
        ("features.taps", ["up1.1", "up1.1"], r"features\.taps must differ"),
        ("classifier.max_timestep", 250, r"must stay below classifier\.max_timestep \(250\)"),
        ("gradient_map.smooth_pixels", -1.0, r"gradient_map\.smooth_pixels must be >= 0 .*got -1"),
        ("saliency.smooth_pixels", 43.0, r"saliency\.smooth_pixels .*image_size \(128\), got 43"),
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
    with pytest.raises(ValueError, match=r"segment\.rows must hold cldf_plus, .*got \['cldf'\]"):
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
    assert CAM_CHANNELS == (MIN_CHANNELS, NORM_GROUPS)


def test_validation_needs_no_samples_where_there_is_none() -> None:
    sound = Config(name="sound", data=Data(dataset="phantom"))
    silent = changed(sound, "cam.fit.validate_every", 0)
    check(changed(silent, "cam.fit.validation_samples", 0))


def test_sizes_of_the_phantom_matter_where_it_is_used() -> None:
    other = Config(name="brats", data=Data(dataset="brats", root="/data"))
    check(changed(other, "data.phantom.num_patients", 0))


def test_the_splits_file_is_found_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    path = write(folder, "mine", {"data": {"dataset": "phantom", "splits": "splits.json"}})
    monkeypatch.chdir(tmp_path)
    expected = str(folder.resolve() / "splits.json")
    for word in (path, "configs/mine.yaml"):
        assert load([word]).data.splits == expected
    other = load([path], ["data.splits=other.json"])
    assert other.data.splits == str(tmp_path.resolve() / "other.json"), "words: working folder"
    assert load([path], ["data.splits="]).data.splits == ""
    assert load([path], [f"data.splits={expected}"]).data.splits == expected


def test_the_demo_starts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load([str(Path(__file__).parents[1] / "configs" / "demo.yaml")])
    assert Path(config.data.splits).is_file()


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
        ValueError, match=r"temperature must be > 0.*decoder\.fit\.keep must be >= 1"
    ):
        check(broken)


def test_a_word_leaves_the_other_settings_of_its_section_as_they_are(phantom: str) -> None:
    """Sections of one class have defaults of their own: a training of 300 steps keeps them."""
    plain = flatten(load([phantom]))
    for stage in STAGES:
        if section := stage.fit_section:
            path = f"{section}.keep"
            changed = flatten(load([phantom], [f"{path}=7"]))
            assert {key for key in plain if plain[key] != changed[key]} == {path}
    bare = Config()
    assert bare.decoder.fit.weight_decay != Fit().weight_decay, "or the test shows nothing"


def test_a_bare_fit_word_means_the_training_of_the_stage(phantom: str) -> None:
    sections = {stage.name: stage.fit_section for stage in STAGES if stage.fit_section}
    assert list(sections) == [
        "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
        "train-patch-classifier",
        "train-decoder",
    ]  # fmt: skip
    for section in sections.values():
        config = load([phantom], ["fit.log_every=7"], fit_section=section)
        assert flatten(config)[f"{section}.log_every"] == 7
        assert list(flatten(config).values()).count(7) == 1


def test_a_bare_fit_word_is_refused_where_there_is_more_than_one_training(phantom: str) -> None:
    with pytest.raises(ValueError, match=r"say which training, e\.g\. diffusion\.fit\.steps=7"):
        load([phantom], ["fit.steps=7"])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere\.yaml"):
        load(["nowhere.yaml"])
    path = tmp_path / "broken.yaml"
    path.write_text("cam: [1, 2")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        load([str(path)])
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load([str(path)])
    with pytest.raises(ValueError, match=r"expected key=value, got 'oops'"):
        load([], ["oops"])


def test_plain_form_and_yaml_hold_everything(tmp_path: Path) -> None:
    config = load(
        [write(tmp_path, "a", PHANTOM)], ["features.taps=[up0.1]", "seed=5", "cam.blocks=[2,1,1,1]"]
    )
    assert from_plain(to_plain(config)) == config
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load([str(again)]) == config
    assert build_section(UNet, to_plain(config.diffusion.net)) == config.diffusion.net


def test_flat_paths_are_those_of_the_command_line(phantom: str) -> None:
    flat = flatten(Config())
    assert flat["decoder.contrast.temperature"] == Contrast().temperature
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())
    for path in ("data.phantom.seed", "diffusion.augment.flip", "seed"):
        word = f"{path}={str(flat[path]).lower()}"
        assert flatten(load([phantom], [word]))[path] == flat[path]


def test_the_configuration_is_read_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().cam.fit.steps = 3  # type: ignore[misc]


def test_importing_the_configuration_imports_no_torch(start: Any, phantom: str) -> None:
    code = (
        "import sys; from cldf_dist.config import load; "
        f"load([{phantom!r}]); assert 'torch' not in sys.modules"
    )
    process = start("-c", code)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.parametrize("name", ["demo", "debug", "brats"])
def test_the_ready_configurations_keep_every_rule(name: str) -> None:
    folder = Path(__file__).parents[1] / "configs"
    load([str(folder / f"{name}.yaml")], ["data.root=/data"])
    load([str(folder / f"{name}.yaml"), str(folder / "small.yaml")], ["data.root=/data"])


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
            r"cg_cdm\.timestep must stay below classifier\.max_noise_le",
        ),
        ("cg_cdm.tau", 1.0, r"cg_cdm\.tau must lie in \[0, 1\), got 1\.0"),
        ("cg_cdm.smooth_pixels", 43.0, r"cg_cdm\.smooth_pixels must be >= 0 .* got 43\.0"),
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


def test_a_value_in_place_of_a_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("data: [1, 2]\n")
    with pytest.raises(ValueError, match=r"odd\.yaml: data must hold keys, got \[1, 2\]"):
        load([str(path)])
    with pytest.raises(ValueError, match=r"cam=5: cam must hold keys, got 5"):
        load([DEMO], ["cam=5"])
    with pytest.raises(ValueError, match=r"cannot merge .*data\.image_size=\["):
        load([DEMO], ["data.image_size=["])


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load([DEMO], ["data.root=~/scans", "runs=~/runs", "data.splits=~/splits.json"])
    found = (config.data.root, config.runs, config.data.splits)
    assert found == tuple(str(tmp_path / name) for name in ("scans", "runs", "splits.json"))
