"""Promises of reading a configuration: files, words, keys, types and paths."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from cldf_dist.config import (
    Config,
    Contrast,
    Fit,
    UNet,
    build_section,
    flatten,
    from_plain,
    load,
    to_plain,
    to_yaml,
)
from cldf_dist.stages import STAGES

PHANTOM = {"data": {"dataset": "phantom"}}
CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = str(CONFIGS / "demo.yaml")


def write(folder: Path, name: str, settings: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def phantom(tmp_path: Path) -> str:
    return write(tmp_path, "phantom", PHANTOM)


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
    config = load([DEMO])
    assert Path(config.data.splits).is_file()


def test_a_word_leaves_the_other_settings_of_its_section_as_they_are(phantom: str) -> None:
    """Sections of one class have defaults of their own: a training of 300 steps keeps them."""
    plain = flatten(load([phantom]))
    for stage in STAGES:
        if section := stage.fit_section:
            path = f"{section}.keep_checkpoints"
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
    load([str(CONFIGS / f"{name}.yaml")], ["data.root=/data"])
    load([str(CONFIGS / f"{name}.yaml"), str(CONFIGS / "small.yaml")], ["data.root=/data"])


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
