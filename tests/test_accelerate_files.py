"""configs/accelerate/: each file is what accelerate's launcher takes, key by key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = sorted((Path(__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def test_the_files_are_those_that_are_documented() -> None:
    names = [path.stem for path in FILES]
    assert names == ["cpu", "ddp", "multi_node", "one_gpu", "zero1", "zero2"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_one_that_accelerate_knows(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    loaded = load_config_from_file(str(path))  # an unknown key is an error there
    for key, value in content(path).items():
        if key not in ("distributed_type", "compute_environment", "deepspeed_config"):
            assert getattr(loaded, key) == value, key
    assert loaded.distributed_type.value == content(path)["distributed_type"]
    assert loaded.mixed_precision == "no", "bf16 is the program's own setting"
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(content(path).get("deepspeed_config", {})) <= set(known)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_zero_files_differ_in_the_stage_alone(stage: int) -> None:
    path = FILES[0].parent / f"zero{stage}.yaml"
    settings = content(path)["deepspeed_config"]
    assert settings["zero_stage"] == stage
    assert settings["deepspeed_multinode_launcher"] == "standard"
    assert settings["offload_optimizer_device"] == settings["offload_param_device"] == "none"
    other = content(FILES[0].parent / f"zero{3 - stage}.yaml")
    other["deepspeed_config"]["zero_stage"] = stage
    assert content(path) == other
