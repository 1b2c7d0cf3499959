import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_dist.inference.loading import load_diffusion
from cldf_dist.training.export import load_net, read_description, save_net


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_weights_come_back_frozen_with_their_description(tmp_path: Path) -> None:
    net = small_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_net(net, tmp_path / "stage", {"kind": "test", "channels": [3, 2]})
    assert read_description(tmp_path / "stage") == {"kind": "test", "channels": [3, 2]}
    names = sorted(path.name for path in (tmp_path / "stage").iterdir())
    assert names == ["net.json", "net.safetensors"]
    loaded = load_net(small_net(), tmp_path / "stage")
    assert_same(loaded.state_dict(), net.state_dict())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no weights at .*net\.safetensors; train the net first"
    ):
        load_net(nn.Linear(1, 1), tmp_path)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=r"net\.json is damaged"):
        read_description(tmp_path)


def test_a_description_of_an_earlier_version_still_loads(debug_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "train-diffusion"
    shutil.copytree(debug_run.folder / "train-diffusion", folder)
    about = read_description(folder)
    del about["monai"], about["net"]["gradient_checkpointing"]
    about["net"]["attention"] = "xformers"  # of the training: it loads anywhere
    (folder / "net.json").write_text(json.dumps(about))
    net, _ = load_diffusion(folder)
    original, _ = load_diffusion(debug_run.folder / "train-diffusion")
    assert_same(net.state_dict(), original.state_dict())
    image = torch.zeros(1, 4, 32, 32)
    assert net(image, torch.zeros(1), class_labels=torch.zeros(1).long()).shape == image.shape
