import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_dist.training.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    read_weights,
    save_checkpoint,
)

RUN = "run-a"


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "task": {"weight": torch.randn(3, 4, generator=generator), "count": torch.tensor(step)},
        "optimizer": {"0/exp_avg": torch.randn(5, generator=generator)},
    }


def save(folder: Path, *steps: int, keep_checkpoints: int = 5) -> None:
    for step in steps:
        save_checkpoint(
            folder,
            RUN,
            {"step": step, "skipped": 1},
            tensors(step),
            keep_checkpoints=keep_checkpoints,
        )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state == {"step": 12, "skipped": 1, "run_id": RUN}
    assert set(found.tensors) == {"task", "optimizer"}
    for name, group in tensors(12).items():
        assert_same(found.tensors[name], group)


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, RUN) is None
    assert newest_checkpoint(tmp_path / "missing", RUN) is None


def test_channels_last_and_shared_tensors_are_stored_plainly(tmp_path: Path) -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_checkpoint(
        tmp_path, RUN, {"step": 1}, {"task": {"a": last, "b": last}}, keep_checkpoints=1
    )
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert_same(found.tensors["task"], {"a": last, "b": last})


def test_a_save_cut_short_leaves_the_previous_checkpoint_and_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 3)
    # what a kill between the first file and the rename leaves
    partial = tmp_path / ".step-00000006.partial"
    shutil.copytree(tmp_path / "step-00000003", partial)
    (partial / "manifest.json").unlink()
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state["step"] == 3
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("file", ["task.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_newest_checkpoint_is_named_and_the_previous_one_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    save(tmp_path, 3, 6)
    path = tmp_path / "step-00000006" / file
    path.write_bytes(path.read_bytes()[:-7])
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state["step"] == 3
    assert_same(found.tensors["task"], tensors(3)["task"])
    warned = capsys.readouterr().err
    assert f"{tmp_path / 'step-00000006'} is skipped: {file} is damaged" in warned
    assert "step-00000003" not in warned


def test_a_flipped_byte_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 3, 4)
    flip_byte(tmp_path / "step-00000004" / "task.safetensors", -1)
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state["step"] == 3
    assert "task.safetensors is damaged" in capsys.readouterr().err
    assert names(tmp_path) == ["damaged-step-00000004", "step-00000003"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000003", "step-00000005"]


def test_without_a_whole_checkpoint_nothing_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hiccup of the file system must not cost a training."""
    save(tmp_path, 3, 4)
    for step in (3, 4):
        flip_byte(tmp_path / f"step-{step:08d}" / "task.safetensors", -1)
    for _ in range(2):  # and not the second time either
        with pytest.raises(
            ValueError, match=r"can be used \(step-00000004: task.* delete that fol"
        ):
            newest_checkpoint(tmp_path, RUN)
    capsys.readouterr()


def test_what_cannot_be_removed_does_not_end_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-00000000").symlink_to(tmp_path)
    (tmp_path / "step-00000001").write_text("a file")
    (tmp_path / ".notes.partial").write_text("a file")
    save(tmp_path, 2, 3, keep_checkpoints=1)
    assert names(tmp_path) == ["step-00000003"]


def test_weights_of_a_checkpoint_are_those_of_the_net_alone(tmp_path: Path) -> None:
    weight = torch.ones(2)
    save_checkpoint(
        tmp_path,
        RUN,
        {"step": 1},
        {"average": {"net.w": weight, "temperature": weight}},
        keep_checkpoints=1,
    )
    assert set(read_weights(tmp_path / "step-00000001")) == {"w"}
    with pytest.raises(FileNotFoundError, match=r"no weights at .*must be a \.safetensors file"):
        read_weights(tmp_path / "nothing")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"pickle\.safetensors is damaged or no safetensors file"):
        read_weights(tmp_path / "pickle.safetensors")


@pytest.mark.parametrize("file", ["manifest.json", "task.safetensors"])
def test_a_missing_file_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    save(tmp_path, 3, 6)
    (tmp_path / "step-00000006" / file).unlink()
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state["step"] == 3
    assert "cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used"):
        newest_checkpoint(tmp_path, "run-b")
    assert "it belongs to another run (run-a)" in capsys.readouterr().err


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10, keep_checkpoints=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    save(tmp_path, 11, keep_checkpoints=1)
    assert names(tmp_path) == ["step-00000011"]


def test_a_damaged_later_checkpoint_does_not_crowd_out_the_good_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3, 9)
    flip_byte(tmp_path / "step-00000009" / "task.safetensors", -1)
    for step in (4, 5):  # training goes on from step 3
        save(tmp_path, step, keep_checkpoints=1)
        found = newest_checkpoint(tmp_path, RUN)
        assert found is not None
        assert found.state["step"] == step
    save(tmp_path, 9, keep_checkpoints=1)
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.state["step"] == 9
    capsys.readouterr()


def test_an_optimizer_comes_back_bit_by_bit(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(2, 3))
        layout: Any = {"memory_format": torch.channels_last}
        net = net.to(**layout)  # its moments must come back in the same layout
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.05, fused=True)
        for step in range(steps):
            move(net, optimizer, step)
        return net, optimizer

    def move(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        images = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()

    net, optimizer = trained(3)
    stored = {"task": net.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    save_checkpoint(tmp_path, RUN, {"step": 3}, stored, keep_checkpoints=1)
    found = newest_checkpoint(tmp_path, RUN)
    assert found is not None
    other, fresh = trained(0)
    other.load_state_dict(found.tensors["task"])
    load_optimizer(fresh, found.tensors["optimizer"])
    assert_same(optimizer_tensors(fresh), optimizer_tensors(optimizer))
    for step in (3, 4):
        move(net, optimizer, step)
        move(other, fresh, step)
    assert_same(other.state_dict(), net.state_dict())
