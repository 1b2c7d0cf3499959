"""Atomic checkpoints.

A checkpoint is a folder `step-00001000` with safetensors, state.json and a manifest of sizes and
checksums. It is written under a temporary name, synced, then renamed. It does not depend on the
number of processes that wrote it, or on how they sharded the optimizer state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cldf_dist.system.distributed import fail_on_all_ranks, processes

Tensors = Mapping[str, Tensor]
MANIFEST, STATE = "manifest.json", "state.json"
DAMAGED = "is damaged (size or checksum differs from the manifest)"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; its tensors are read on first use."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """The step, counters and other values that are not tensors."""
        content: dict[str, Any] = json.loads((self.path / STATE).read_text())
        return content

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by name of each safetensors file, by the file's stem."""
        names = json.loads((self.path / MANIFEST).read_text())
        files = [self.path / name for name in names if name.endswith(".safetensors")]
        return {file.stem: load_file(file) for file in files}


def save_checkpoint(
    folder: Path,
    run_id: str,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensors],
    *,
    keep_checkpoints: int,
) -> Path:
    """Write one checkpoint atomically, then remove all but the newest `keep_checkpoints`.

    Called on every process; the main one writes. Returns the checkpoint's folder. A failure raises
    on all processes and leaves no partial checkpoint.
    """
    final = folder / f"step-{state['step']:08d}"
    with fail_on_all_ranks():
        if processes().is_main:
            temporary = folder / f".{final.name}.partial"
            try:
                _make_room(folder, temporary)
                _write_into(temporary, {**state, "run_id": run_id}, tensors)
                _put_in_place(temporary, final, keep_checkpoints)
            except BaseException:  # what is half written must not take up room
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return final


def newest_checkpoint(folder: Path, run_id: str) -> Checkpoint | None:
    """The newest checkpoint that matches its manifest; None where there is no checkpoint.

    Damaged ones are reported, and renamed to `damaged-step-...` where an older one is intact.
    Raises ValueError where none can be used: to start again at step 0 is the user's decision.
    """
    faults: dict[Path, str] = {}
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path, run_id)
        if not fault:
            _set_aside(damaged for damaged, fault in faults.items() if DAMAGED in fault)
            return Checkpoint(path)
        print(f"warning: {path} is skipped: {fault}", file=sys.stderr)
        faults[path] = fault
    if faults:
        found = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
        raise ValueError(
            f"no checkpoint in {folder} can be used ({found}); restore the missing files, or "
            "delete that folder to start again at step 0"
        )
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a net, by name.

    `path` is the folder of a finished training, a checkpoint (its moving average is read) or a
    safetensors file. Nothing in safetensors is executed. Raises FileNotFoundError where `path` is
    none of the three and ValueError where a file is damaged.
    """
    places = (path, path / "net.safetensors", path / "average.safetensors")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no weights at {path}: it must be a .safetensors file, the folder of a finished "
            "training, or one of its checkpoints (checkpoints/step-...)"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    if file.name == "average.safetensors":  # it holds the whole task
        return {
            name.removeprefix("net."): value
            for name, value in tensors.items()
            if name.startswith("net.")
        }
    return tensors


def write_tensors(group: Tensors, path: Path) -> None:
    """Write and sync one safetensors file; raises an OSError that names the file."""
    try:
        save_file(_plain(group), path)
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))  # its only trace of the system's errno
        if cause:
            raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
        raise OSError(f"cannot write {path}: {error}; use another disk with runs=FOLDER") from error
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer state by `parameter number/name`; plain numbers become tensors."""
    return {
        f"{number}/{name}": torch.as_tensor(value)
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restore the optimizer state from the tensors of `optimizer_tensors`."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # fused kernels read memory in order and ignore strides (torch 2.13)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _make_room(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.partial"):
        _remove(stale)
    temporary.mkdir()


def _write_into(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
    for name, group in tensors.items():
        write_tensors(group, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(state))
    manifest = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for path in (folder / STATE, folder / MANIFEST, folder):
        sync(path)


def _put_in_place(temporary: Path, final: Path, keep_checkpoints: int) -> None:
    folder = final.parent
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync(folder)
    # a later one was skipped, say as unreadable: it must not count among those that are kept
    older = sorted(path for path in folder.glob("step-*") if path.name < final.name)
    for old in [
        *older[: max(len(older) + 1 - keep_checkpoints, 0)],
        *folder.glob("damaged-step-*"),
    ]:
        _remove(old)


def _set_aside(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.rename(path.with_name(f"damaged-{path.name}"))


def _remove(path: Path) -> None:
    """Remove a file or folder; warns on failure, because a training can go on without the space."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        print(f"warning: cannot remove {path}: {error}", file=sys.stderr)


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
    """The reason why the checkpoint cannot be used; empty where it is intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                return f"{name} {DAMAGED}"
        owner = json.loads((path / STATE).read_text())["run_id"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"it cannot be read ({error})"
    if STATE not in manifest:
        return f"{STATE} is not in its manifest"
    return "" if owner == run_id else f"it belongs to another run ({owner})"
