"""Slices on disk: plain webdataset tars plus a manifest that knows where each member lies.

A slice is the members `<key>.image.npy` (channels, height, width) int16, `<key>.meta.json` and,
where a mask exists, `<key>.mask.npy` uint8. Reading is indexed: one `pread` per member, checked
against the manifest's crc32c, so that damage is found and named.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import webdataset

from cldf_dist.data.slices import Floats, Geometry, Mask, Slice, dequantise, quantise
from cldf_dist.whole_files import whole_file

FORMAT = "cldf-shards"
VERSION = 1
MANIFEST = "manifest.json"
IMAGE, META, MASK = "image.npy", "meta.json", "mask.npy"  # members of a sample
MAX_OPEN_FILES = 64  # per process and table
ON_DAMAGED = ("error", "skip")

Record = dict[str, Any]  # one entry of the manifest


class DamagedShardError(ValueError):
    """A shard is not what the manifest says it is."""


def write_shards(
    folder: str | Path, split: str, slices: Iterable[Slice], slices_per_shard: int
) -> list[Record]:
    """Write `<split>-00000.tar`, ... and return their records for the manifest.

    The same slices give the same bytes. Each shard is written under a temporary name, read back,
    then renamed. Older shards of this split are removed first.
    """
    if slices_per_shard < 1:
        raise ValueError(f"data.slices_per_shard must be >= 1, got {slices_per_shard}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}-*.tar.partial")):
        old.unlink()
    records: list[Record] = []
    remaining = iter(slices)
    while group := list(islice(remaining, slices_per_shard)):
        name = f"{split}-{len(records):05d}.tar"
        records.append(_write_shard(folder, name, split, group))
    return records


def write_manifest(
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    channels: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    geometry: Mapping[str, Geometry],
    shards: Sequence[Record],
) -> Path:
    """Write manifest.json, whole or not at all; call it when all shards are there."""
    path = Path(folder) / MANIFEST
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "channels": list(channels),
        "splits": {split: list(names) for split, names in splits.items()},
        "geometry": {patient: geometry[patient].to_json() for patient in sorted(geometry)},
        "shards": list(shards),
    }
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())
    return path


class ShardSet:
    """The prepared slices of a folder.

    Raises FileNotFoundError without a manifest and DamagedShardError where a shard is missing or
    has another size. With `on_damaged="skip"` it drops damaged slices instead and warns.
    """

    def __init__(self, folder: str | Path, *, on_damaged: str = "error") -> None:
        if on_damaged not in ON_DAMAGED:
            raise ValueError(f"data.on_damaged must be error or skip, got {on_damaged!r}")
        self.folder = Path(folder)
        self.on_damaged = on_damaged
        self.manifest = _read_manifest(self.folder)
        self._tables: dict[str, SliceTable] = {}  # looking for damage reads every slice
        if on_damaged == "error":
            for shard in self.manifest["shards"]:
                _check_size(self.folder, shard)

    @property
    def patients(self) -> dict[str, list[str]]:
        """Names of the patients of each split."""
        return dict(self.manifest["splits"])

    def geometry(self, patient: str) -> Geometry:
        """How the slices of a patient lie in its scan."""
        try:
            return Geometry.from_json(self.manifest["geometry"][patient])
        except KeyError:
            raise ValueError(f"{self.folder} has no patient {patient!r}") from None

    def split(self, name: str) -> "SliceTable":
        """The slices of one split, in manifest order."""
        if name not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise ValueError(f"{self.folder} has the splits {known}; got {name!r}")
        if name not in self._tables:
            table = SliceTable(
                self.folder, [shard for shard in self.manifest["shards"] if shard["split"] == name]
            )
            self._tables[name] = table if self.on_damaged == "error" else table.without_damaged()
        return self._tables[name]

    def verify(self) -> None:
        """Read every byte: raise DamagedShardError unless each shard has its size and sha256."""
        for shard in self.manifest["shards"]:
            path = _check_size(self.folder, shard)
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise DamagedShardError(f"{path} is damaged: its sha256 is wrong; {_REMEDY}")


class SliceTable:
    """Slices by row number: what the manifest says about them, and their pixels on demand.

    Safe to pickle and to fork: files are opened where they are read.
    """

    def __init__(self, folder: str | Path, shards: Sequence[Record]) -> None:
        samples = [sample for shard in shards for sample in shard["samples"]]
        self.folder = Path(folder)
        self.shard_names = tuple(str(shard["name"]) for shard in shards)
        self.keys = tuple(str(sample["key"]) for sample in samples)
        self.patients = tuple(str(sample["patient"]) for sample in samples)
        self.indices = np.array([sample["index"] for sample in samples], np.int64)
        self.labels = np.array([sample["label"] for sample in samples], np.int8)
        self.shard_of = np.repeat(
            np.arange(len(shards)), [len(shard["samples"]) for shard in shards]
        ).astype(np.int64)
        self._images = _spans(samples, "image")
        self._masks = _spans(samples, "mask")
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return len(self.keys)

    def read_image(self, row: int) -> Floats:
        """One slice, (channels, height, width) in [-1, 1]."""
        return dequantise(self._read_array(row, self._images[row], IMAGE))

    def read_images(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Floats:
        """Several slices, (num_rows, channels, height, width)."""
        return np.stack([self.read_image(int(row)) for row in rows])

    def read_mask(self, row: int) -> Mask | None:
        """The mask, (height, width), or None where there is none.

        For reference rows, evaluation and diagnostics only: CLDF never trains on masks.
        """
        if self._masks[row, 0] < 0:
            return None
        return np.asarray(self._read_array(row, self._masks[row], MASK) > 0)

    def without_damaged(self) -> "SliceTable":
        """The rows whose images pass their checksum; warns with the number of the others."""
        intact, damaged = [], []
        for row in range(len(self)):
            try:
                self._read(row, self._images[row], IMAGE)
            except DamagedShardError as error:
                damaged.append(str(error))
            else:
                intact.append(row)
        if not damaged:
            return self
        warnings.warn(
            f"data.on_damaged=skip: {len(damaged)} of {len(self)} slices are damaged and not used; "
            f"the first: {damaged[0]}",
            stacklevel=3,
        )
        return self._rows(intact)

    def _rows(self, rows: list[int]) -> "SliceTable":
        table = SliceTable(self.folder, [])
        table.shard_names = self.shard_names
        table.keys = tuple(self.keys[row] for row in rows)
        table.patients = tuple(self.patients[row] for row in rows)
        table.indices, table.labels = self.indices[rows], self.labels[rows]
        table.shard_of = self.shard_of[rows]
        table._images, table._masks = self._images[rows], self._masks[rows]
        return table

    def _read_array(self, row: int, span: npt.NDArray[np.int64], member: str) -> npt.NDArray[Any]:
        content = self._read(row, span, member)
        start = 10 + int.from_bytes(content[8:10], "little")
        shape, dtype = _npy_layout(content[:start])
        return np.frombuffer(content, dtype, offset=start).reshape(shape)

    def _read(self, row: int, span: npt.NDArray[np.int64], member: str) -> bytes:
        path = self.folder / self.shard_names[self.shard_of[row]]
        offset, length, checksum = span.tolist()
        try:
            content = self._files.read(path, offset, length)
        except FileNotFoundError:
            raise DamagedShardError(f"{path} is missing; {_REMEDY}") from None
        name = f"{self.keys[row]}.{member}"
        if len(content) != length:
            raise DamagedShardError(f"{path} is truncated: {name} is incomplete; {_REMEDY}")
        if google_crc32c.value(content) != checksum:
            raise DamagedShardError(f"{path} is damaged: {name} has a wrong crc32c; {_REMEDY}")
        return content


_REMEDY = "delete the folder and prepare the data again, or set data.on_damaged=skip"


class _OpenFiles:
    """The most recently read files, kept open; a copy in another process opens its own."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._descriptors[path] = descriptor
        if len(self._descriptors) > MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        return os.pread(descriptor, length, offset)

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[()]]:
        return _OpenFiles, ()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _write_shard(folder: Path, name: str, split: str, slices: list[Slice]) -> Record:
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
    """Name and [offset, length, crc32c] of each member, as found in the file just written."""
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


@lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype from the header of a version-1 npy file; every slice has the same."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _spans(samples: Sequence[Record], member: str) -> npt.NDArray[np.int64]:
    """(num_samples, 3): offset, length and crc32c; -1 where the sample has no such member."""
    spans = [sample[member] or (-1, -1, -1) for sample in samples]
    return np.array(spans, np.int64).reshape(len(spans), 3)


def _read_manifest(folder: Path) -> Record:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the data is not prepared; run: cldf prepare"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; prepare the data again") from error
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} must be {FORMAT} version {VERSION}, got {found}; prepare again")
    return dict(manifest)


def _check_size(folder: Path, shard: Record) -> Path:
    path = folder / str(shard["name"])
    if not path.is_file():
        raise DamagedShardError(f"{path} is missing; {_REMEDY}")
    size = path.stat().st_size
    if size != shard["size"]:
        what = "truncated" if size < shard["size"] else "damaged"
        raise DamagedShardError(f"{path} is {what}: {size} of {shard['size']} bytes; {_REMEDY}")
    return path
