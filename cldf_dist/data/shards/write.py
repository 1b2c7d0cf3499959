"""The writing of shards: each under a temporary name, read back, then renamed; manifest last."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import webdataset

from cldf_dist.data.shards.remote import ManifestEntry
from cldf_dist.data.shards.table import FORMAT, IMAGE, MANIFEST, MASK, META, VERSION
from cldf_dist.data.slices import Geometry, Slice, quantise
from cldf_dist.system.files import atomic_write


def write_shards(
    folder: str | Path, split: str, slices: Iterable[Slice], slices_per_shard: int
) -> list[ManifestEntry]:
    """Write `<split>-00000.tar`, ...; returns their entries for the manifest.

    The same slices give the same bytes. Each shard is written under a temporary name, read back,
    then renamed. Older shards of this split are removed first. Raises ValueError unless
    `slices_per_shard` >= 1, OSError where a file reads back differently.
    """
    if slices_per_shard < 1:
        raise ValueError(f"data.slices_per_shard must be >= 1, got {slices_per_shard}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}-*.tar.partial")):
        old.unlink()
    entries: list[ManifestEntry] = []
    remaining = iter(slices)
    while group := list(islice(remaining, slices_per_shard)):
        name = f"{split}-{len(entries):05d}.tar"
        entries.append(_write_shard(folder, name, split, group))
    return entries


def write_manifest(
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    channels: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    geometry: Mapping[str, Geometry],
    shards: Sequence[ManifestEntry],
    truth: Mapping[str, str] | None = None,
) -> Path:
    """Write manifest.json atomically, once all shards are written; returns its path.

    `truth` is the sha256 of the true mask of each patient that has one in `<folder>/truth`.
    """
    path = Path(folder) / MANIFEST
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "channels": list(channels),
        "splits": {split: list(names) for split, names in splits.items()},
        "geometry": {patient: geometry[patient].to_json() for patient in sorted(geometry)},
        "truth": dict(truth or {}),
        "shards": list(shards),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())
    return path


def _write_shard(folder: Path, name: str, split: str, slices: list[Slice]) -> ManifestEntry:
    members = [_members(item) for item in slices]
    partial = folder / f"{name}.partial"
    try:
        with open(partial, "wb") as file:
            with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
                for item, contents in zip(slices, members):
                    writer.write({"__key__": item.key, **contents})
            file.flush()
            os.fsync(file.fileno())
        spans = dict(_verified_spans(partial, slices, members))
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = partial.stat().st_size
        os.replace(partial, folder / name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    labels = [item.label for item in slices]
    return {
        "name": name,
        "split": split,
        "size": size,
        "sha256": digest,
        "num_slices": len(slices),
        "label_counts": {str(label): labels.count(label) for label in sorted(set(labels))},
        "samples": [
            {
                "key": item.key,
                "patient": item.patient,
                "index": item.index,
                "label": item.label,
                "image": spans[f"{item.key}.{IMAGE}"],
                "meta": spans[f"{item.key}.{META}"],
                "mask": spans.get(f"{item.key}.{MASK}"),
            }
            for item in slices
        ],
    }


def _members(item: Slice) -> dict[str, bytes]:
    meta = {name: getattr(item, name) for name in ("key", "patient", "index", "label")}
    members = {
        IMAGE: _npy_bytes(quantise(item.image)),
        META: json.dumps(meta, sort_keys=True).encode(),
    }
    if item.mask is not None:
        members[MASK] = _npy_bytes(item.mask.astype(np.uint8))
    return members


def _verified_spans(
    path: Path, slices: list[Slice], members: list[dict[str, bytes]]
) -> Iterator[tuple[str, list[int]]]:
    """Name and [offset, length, crc32c] of each member, read back from the written file."""
    expected = {
        f"{item.key}.{member}": content
        for item, contents in zip(slices, members)
        for member, content in contents.items()
    }
    with tarfile.open(path, "r:") as tar:
        found = {member.name: member for member in tar}
        if sorted(found) != sorted(expected):
            raise OSError(f"{path} does not hold what was written to it; check the disk")
        for name, member in found.items():
            file = tar.extractfile(member)
            content = b"" if file is None else file.read()
            if content != expected[name]:
                raise OSError(f"{path} does not hold what was written to it; check the disk")
            yield name, [member.offset_data, member.size, google_crc32c.value(content)]


def _npy_bytes(array: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0))
    return stream.getvalue()
