"""Checkpoints that are whole or absent, and weights that anybody can load.

A checkpoint is a folder `step-00001000` with safetensors, state.json and a manifest of sizes and
checksums. It is written under a temporary name, synced, then renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    state: dict[str, Any]  # step and other plain facts
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors


def save_checkpoint(
    folder: Path,
    run_id: str,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensors],
    *,
    keep: int,
) -> Path:
    """Write one checkpoint atomically, then drop all but the newest `keep`."""
    final = folder / f"step-{state['step']:08d}"
    temporary = folder / f".{final.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.partial"):
        shutil.rmtree(stale)
    temporary.mkdir()
    try:
        _write_into(temporary, {**state, "run_id": run_id}, tensors)
    except OSError:  # no room: what is half written must not take up more of it
        shutil.rmtree(temporary)
        raise
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    # a later one was passed over as damaged: it must not count among those that are kept
    older = sorted(path for path in folder.glob("step-*") if path.name < final.name)
    for old in older[: max(len(older) + 1 - keep, 0)]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(folder: Path, run_id: str) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are named."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path, run_id)
        if fault:
            print(f"warning: {path} is passed over: {fault}", file=sys.stderr)
            continue
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(json.loads((path / "state.json").read_text()), tensors)
    return None


def save_net(net: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Write `net.safetensors` and, beside it, `net.json`: all that is needed to build the net."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".net.safetensors.partial"
    try:
        _save(net.state_dict(), temporary)
        _sync(temporary)
        temporary.replace(folder / "net.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "net.json").write_text(json.dumps(dict(description), indent=1))
    _sync(folder / "net.json")


def load_net(net: nn.Module, folder: Path) -> nn.Module:
    """`net` with the weights of `folder`, frozen and in evaluation mode."""
    path = folder / "net.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train the net first")
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def read_description(folder: Path) -> dict[str, Any]:
    """What `save_net` wrote beside the weights."""
    result: dict[str, Any] = json.loads((folder / "net.json").read_text())
    return result


def _write_into(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
    for name, group in tensors.items():
        _save(group, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    manifest = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _save(group: Tensors, path: Path) -> None:
    try:
        save_file(_plain(group), path)
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))  # its only trace of the system's errno
        if cause:
            raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
        raise OSError(
            f"cannot write {path}: {error}; take another disk with runs=FOLDER"
        ) from error


def _plain(group: Tensors) -> dict[str, Tensor]:
    # safetensors refuses shared memory and permuted strides (channels_last)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}


def _fingerprint(path: Path) -> dict[str, int]:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum.update(block)
    return {"size": path.stat().st_size, "crc32c": int.from_bytes(checksum.digest(), "big")}


def _fault(path: Path, run_id: str) -> str:
    """Why the checkpoint must not be used; empty where it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged (size or checksum differs from the manifest)"
        owner = json.loads((path / "state.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read ({error})"
    return "" if owner == run_id else f"it belongs to another run ({owner})"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `parameter number/name`; plain numbers become tensors."""
    return {
        f"{number}/{name}": torch.as_tensor(value)
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/", 1)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
