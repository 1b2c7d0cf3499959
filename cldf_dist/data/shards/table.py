"""Prepared slices on disk: webdataset tars, and a manifest with the offset of each member.

A slice is the members `<key>.image.npy` (channels, height, width) int16, `<key>.meta.json` and,
where a mask exists, `<key>.mask.npy` uint8. Reading is indexed: one `pread` per member, checked
against the manifest's crc32c, so that damage is found and named.
"""

import copy
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from cldf_dist.data.shards.files import REMEDY, ShardFiles
from cldf_dist.data.shards.remote import ManifestEntry as ManifestEntry
from cldf_dist.data.shards.remote import RemoteShards, ShardCache
from cldf_dist.data.slices import Floats, Geometry, Mask, dequantise
from cldf_dist.system.files import DamagedShardError

FORMAT = "cldf-shards"
VERSION = 1
MANIFEST = "manifest.json"
NPY_PREFIX = 10  # bytes before the header of a version-1 npy file; the last two are its length
IMAGE, META, MASK = "image.npy", "meta.json", "mask.npy"  # members of a sample
ON_DAMAGED = ("error", "skip")

Stored = npt.NDArray[np.int16]


def parse_manifest(content: bytes, source: str) -> ManifestEntry:
    """A manifest from its bytes; raises ValueError, with the source, for another format."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}; prepare the data again") from error
    known = isinstance(manifest, dict)
    found = (manifest.get("format"), manifest.get("version")) if known else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{source} must be {FORMAT} version {VERSION}, got {found}; prepare again")
    return dict(manifest)


class ShardSet:
    """The prepared slices of a folder, whose shards are local or remote by the manifest.

    Remote ones are staged through `cache`. Raises FileNotFoundError without a manifest and
    DamagedShardError where a local shard is missing or has another size. With `on_damaged="skip"`
    it leaves out damaged slices instead and warns.
    """

    def __init__(
        self, folder: str | Path, *, on_damaged: str = "error", cache: ShardCache | None = None
    ) -> None:
        if on_damaged not in ON_DAMAGED:
            raise ValueError(f"data.on_damaged must be error or skip, got {on_damaged!r}")
        self.folder = Path(folder)
        self.on_damaged = on_damaged
        self.manifest = _read_manifest(self.folder)
        self._tables: dict[str, SliceTable] = {}  # looking for damage reads every slice
        self._remote: RemoteShards | None = None
        if location := self.manifest.get("location"):
            self._remote = RemoteShards(location, cache or ShardCache.default())
            if cache:
                cache.check_size(self.manifest["shards"])
        elif on_damaged == "error":
            for shard in self.manifest["shards"]:
                _check_size(self.folder, shard)

    @property
    def patients(self) -> dict[str, list[str]]:
        """The names of the patients of each split."""
        return dict(self.manifest["splits"])

    def geometry(self, patient: str) -> Geometry:
        """The place of a patient's slices in its scan; raises ValueError for another patient."""
        try:
            return Geometry.from_json(self.manifest["geometry"][patient])
        except KeyError:
            raise ValueError(f"{self.folder} has no patient {patient!r}") from None

    def split(self, name: str) -> "SliceTable":
        """The slices of one split, in manifest order; raises ValueError for an unknown split."""
        if name not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise ValueError(f"{self.folder} has the splits {known}; got {name!r}")
        if name not in self._tables:
            shards = [shard for shard in self.manifest["shards"] if shard["split"] == name]
            table = SliceTable(self.folder, shards, self._remote)
            self._tables[name] = table if self.on_damaged == "error" else table.without_damaged()
        return self._tables[name]

    def verify(self) -> None:
        """Read every byte; raises DamagedShardError unless each shard has its size and sha256."""
        for shard in self.manifest["shards"]:
            remote = self._remote
            path = remote.cache.path(shard) if remote else _check_size(self.folder, shard)
            with open(remote.open(shard) if remote else path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise DamagedShardError(f"{path} is damaged: its sha256 is wrong; {REMEDY}")


class SliceTable:
    """Slices by index: their records in the manifest, and their pixels on demand.

    Safe to pickle and to fork: files are opened when they are read. Not thread-safe.
    """

    def __init__(
        self,
        folder: str | Path,
        shards: Sequence[ManifestEntry],
        remote: RemoteShards | None = None,
    ) -> None:
        samples = [sample for shard in shards for sample in shard["samples"]]
        self.keys = tuple(str(sample["key"]) for sample in samples)
        self.patients = tuple(str(sample["patient"]) for sample in samples)
        self.indices = np.array([sample["index"] for sample in samples], np.int64)
        self.labels = np.array([sample["label"] for sample in samples], np.int8)
        self.shard_of = np.repeat(
            np.arange(len(shards)), [len(shard["samples"]) for shard in shards]
        ).astype(np.int64)
        self._images = _spans(samples, "image")
        self._masks = _spans(samples, "mask")
        self._files = ShardFiles(Path(folder), shards, remote)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_mask(self) -> npt.NDArray[np.bool_]:
        """True for each slice that has a mask, by the manifest."""
        return np.asarray(self._masks[:, 0] >= 0)

    def read_image(self, slice_index: int) -> Floats:
        """One slice, (channels, height, width) in [-1, 1].

        Raises DamagedShardError where it fails its checksum.
        """
        return dequantise(self._read_array(slice_index, self._images[slice_index], IMAGE))

    def read_stored(self, slice_index: int, out: Stored | None = None) -> Stored:
        """One slice as it is stored, (channels, height, width) int16.

        `out`, where given, is filled without an intermediate copy. Raises ValueError where it is
        not contiguous or of another shape or dtype.
        """
        span = self._images[slice_index]
        if out is None:
            return self._read_array(slice_index, span, IMAGE).copy()
        header = np.empty(max(int(span[1]) - out.nbytes, 0), np.uint8)
        whole = len(header) > NPY_PREFIX and out.flags.c_contiguous
        if whole:
            self._read(slice_index, span, IMAGE, [header, out])
            whole = _header_length(header) == len(header)
            whole = whole and (out.shape, out.dtype) == _npy_layout(header.tobytes())
        if not whole:
            like = self._read_array(slice_index, span, IMAGE)
            raise ValueError(
                f"out must be a contiguous array of {like.shape} {like.dtype}, "
                f"got {out.shape} {out.dtype}"
            )
        return out

    def read_images(self, slice_indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Floats:
        """The slices with these indices, (slices, channels, height, width)."""
        return np.stack([self.read_image(int(slice_index)) for slice_index in slice_indices])

    def read_mask(self, slice_index: int) -> Mask | None:
        """The mask, (height, width), or None where there is none.

        For reference methods, evaluation and diagnostics only: CLDF never trains on masks.
        """
        if self._masks[slice_index, 0] < 0:
            return None
        return np.asarray(self._read_array(slice_index, self._masks[slice_index], MASK) > 0)

    def without_damaged(self) -> "SliceTable":
        """The slices whose images pass their checksum; warns with the number of the others."""
        intact, damaged = [], []
        for slice_index in range(len(self)):
            try:
                self._read_array(slice_index, self._images[slice_index], IMAGE)
            except DamagedShardError as error:
                damaged.append(str(error))
            else:
                intact.append(slice_index)
        if not damaged:
            return self
        warnings.warn(
            f"data.on_damaged=skip: {len(damaged)} of {len(self)} slices are damaged and not used; "
            f"the first: {damaged[0]}",
            stacklevel=3,
        )
        return self._selected(intact)

    def _selected(self, slice_indices: list[int]) -> "SliceTable":
        table = copy.copy(self)
        table.keys = tuple(self.keys[slice_index] for slice_index in slice_indices)
        table.patients = tuple(self.patients[slice_index] for slice_index in slice_indices)
        table.indices, table.labels = self.indices[slice_indices], self.labels[slice_indices]
        table.shard_of = self.shard_of[slice_indices]
        table._images, table._masks = self._images[slice_indices], self._masks[slice_indices]
        return table

    def _read_array(
        self, slice_index: int, span: npt.NDArray[np.int64], member: str
    ) -> npt.NDArray[Any]:
        """A member's array, as a view that the next read overwrites."""
        content = self._files.scratch(int(span[1]))
        self._read(slice_index, span, member, [content])
        start = _header_length(content)
        shape, dtype = _npy_layout(content[:start].tobytes())
        return content[start:].view(dtype).reshape(shape)

    def _read(
        self,
        slice_index: int,
        span: npt.NDArray[np.int64],
        member: str,
        buffers: list[npt.NDArray[Any]],
    ) -> None:
        """Fill the buffers in turn with a member; raises DamagedShardError for a wrong checksum."""
        shard = int(self.shard_of[slice_index])
        offset, length, checksum = span.tolist()
        for _ in range(2):
            num_read, found = self._files.read(shard, offset, buffers), 0
            for buffer in buffers:
                found = google_crc32c.extend(found, buffer)
            if num_read == length and found == checksum:
                return
            if not self._files.drop_copy(shard):  # a staged one is fetched again
                break
        path, name = self._files.path(shard), f"{self.keys[slice_index]}.{member}"
        if num_read != length:
            raise DamagedShardError(f"{path} is truncated: {name} is incomplete; {REMEDY}")
        raise DamagedShardError(f"{path} is damaged: {name} has a wrong crc32c; {REMEDY}")


def _header_length(content: npt.NDArray[np.uint8]) -> int:
    """The number of bytes before the array in a version-1 npy file."""
    return NPY_PREFIX + int(content[8]) + 256 * int(content[9])


@lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype from the header of a version-1 npy file; every slice has the same."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _spans(samples: Sequence[ManifestEntry], member: str) -> npt.NDArray[np.int64]:
    """Offset, length and crc32c of a member, (samples, 3); -1 where a sample has no such member."""
    spans = [sample[member] or (-1, -1, -1) for sample in samples]
    return np.array(spans, np.int64).reshape(len(spans), 3)


def _read_manifest(folder: Path) -> ManifestEntry:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the data is not prepared; run: cldf prepare"
        )
    return parse_manifest(path.read_bytes(), str(path))


def _check_size(folder: Path, shard: ManifestEntry) -> Path:
    path = folder / str(shard["name"])
    if not path.is_file():
        raise DamagedShardError(f"{path} is missing; {REMEDY}")
    size = path.stat().st_size
    if size != shard["size"]:
        what = "truncated" if size < shard["size"] else "damaged"
        raise DamagedShardError(f"{path} is {what}: {size} of {shard['size']} bytes; {REMEDY}")
    return path
