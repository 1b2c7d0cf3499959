"""The creation of an empty feature store, and the repair of its metadata."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from cldf_dist.data.features.chunk_file import remove

KEY_BYTES = 64  # zarr v3 strings are unstable: keys are fixed-width bytes
FORMAT = "cldf-features"
VERSION = 2
OWN = {"key": ((KEY_BYTES,), "uint8"), "done": ((), "uint64")}  # arrays that every store has
STALE_SECONDS = 3600.0  # an unfinished store untouched for this long has lost its creator


def create_store(
    folder: Path,
    num_slices: int,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    slices_per_shard: int,
    attributes: Mapping[str, Any],
) -> None:
    """Create an empty store of `num_slices`; `arrays` gives shape and dtype of one slice of each.

    Several processes may call it at once: all get the store of the first.
    """
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale)
    # a process's number is not its own where containers share a disk
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        group = zarr.create_group(partial, zarr_format=3, attributes={
            "format": FORMAT, "version": VERSION, "num_slices": num_slices,
            "slices_per_shard": slices_per_shard, "arrays": list(arrays), **attributes,
        })  # fmt: skip
        for name, (shape, dtype) in {**arrays, **OWN}.items():
            group.create_array(
                name,
                shape=(num_slices, *shape),
                chunks=(1, *shape),
                shards=(slices_per_shard, *shape),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
                config={"write_empty_chunks": True},  # no file stands for zeros
            )
        if not (folder / "zarr.json").exists():
            _rename_unless_there(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def repair_metadata(folder: Path, fresh: Path) -> list[str]:
    """Copy each zarr.json of the empty store `fresh` that is missing or differs in `folder`.

    That of the group is copied only where it cannot be read. Returns the names of copied files.
    """
    repaired = []
    for right in sorted(fresh.rglob("zarr.json")):
        name = right.relative_to(fresh)
        there = folder / name
        if there.is_file():
            content = there.read_bytes()
            if content == right.read_bytes() or (name.parent == Path() and _is_ours(content)):
                continue
        remove(there)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(right, there)
        repaired.append(str(name))
    return repaired


def _is_ours(content: bytes) -> bool:
    try:
        about = json.loads(content)["attributes"]
        return bool(about["format"] == FORMAT and about["version"] == VERSION and about["arrays"])
    except (ValueError, KeyError, TypeError):
        return False


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)  # with all its arrays, or not there
    except OSError:
        if not (folder / "zarr.json").exists():  # else another process was faster
            raise


def encoded_key(key: str) -> npt.NDArray[np.uint8]:
    """The stored bytes of a slice key; raises ValueError where it is too long."""
    raw = key.encode()
    if len(raw) > KEY_BYTES:
        raise ValueError(f"slice key {key!r} has {len(raw)} bytes; the cache takes {KEY_BYTES}")
    return np.frombuffer(raw.ljust(KEY_BYTES, b"\0"), dtype=np.uint8)
