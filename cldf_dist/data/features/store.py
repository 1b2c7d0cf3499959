"""FeatureCache: one zarr v3 group of per-slice arrays, sharded so that every file has one writer.

A zarr shard that was never written silently reads as zeros; the array `done` tells which were. It
holds, per slice, 1 + the crc32c of all its arrays' bytes, and is written after they are on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from cldf_dist.data.features.chunk_file import (
    REPAIR,
    MappedShard,
    as_bytes,
    read_shard_file,
    remove,
    write_shard_file,
)  # fmt: skip
from cldf_dist.data.features.store_creation import FORMAT, OWN, VERSION, create_store, encoded_key
from cldf_dist.system.files import DamagedShardError

Array = npt.NDArray[Any]
SCALE = ".scale"  # suffix of the array by which another one's integers are multiplied
MOST_MAPPED = 32768  # files; the system's own limit is 65530 mappings a process

Stamp = tuple[int, int, int]


class FeatureCache:
    """The features, maps, seeds, label and key of each slice, by slice index.

    It can be pickled to spawned processes. A shard that another process rewrites is read again.
    Raises FileNotFoundError where there is no store, DamagedShardError for damaged metadata and
    ValueError for another format or version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        about = self.folder / "zarr.json"
        if not about.exists():
            raise FileNotFoundError(f"no feature cache at {self.folder}; run: cldf cache CONFIG")
        try:
            self._group: zarr.Group = zarr.open_group(self.folder, mode="r+", zarr_format=3)
            self._attributes: dict[str, Any] = dict(self._group.attrs)
        except Exception as error:  # zarr's own errors have no common kind
            raise DamagedShardError(
                f"{about} is damaged: {' '.join(str(error).split())}; {REPAIR}"
            ) from error
        if self._attributes.get("format") != FORMAT:
            raise ValueError(f"{self.folder} is a zarr group, but not a {FORMAT} one")
        if self._attributes.get("version") != VERSION:
            raise ValueError(
                f"{self.folder} is of version {self._attributes.get('version')}, this program "
                f"reads version {VERSION}; delete the cache stage's folder and run: cldf cache "
                "CONFIG"
            )
        self._arrays: dict[str, Any] = {}
        self._files: dict[tuple[str, int], tuple[str, Path]] = {}
        self._mapped: dict[tuple[str, int], tuple[Stamp, MappedShard]] = {}
        self._known_done: set[int] = set()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.folder,)  # opened anew there

    @classmethod
    def create(
        cls,
        folder: Path,
        num_slices: int,
        arrays: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        slices_per_shard: int,
        attributes: Mapping[str, Any],
    ) -> FeatureCache:
        """Create a store by `create_store` and open it."""
        create_store(
            folder, num_slices, arrays, slices_per_shard=slices_per_shard, attributes=attributes
        )
        return cls(folder)

    def __len__(self) -> int:
        return int(self._attributes["num_slices"])

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the zarr group."""
        return self._attributes

    @property
    def names(self) -> list[str]:
        """The names of the arrays, without `key` and `done`."""
        return list(self._attributes["arrays"])

    @property
    def num_shards(self) -> int:
        """The number of shards of each array."""
        return -(-len(self) // self.slices_per_shard)

    @property
    def slices_per_shard(self) -> int:
        """The number of slices of each shard; the last one may hold fewer."""
        return int(self._attributes["slices_per_shard"])

    def slice_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one slice of an array."""
        return tuple(self._array(name).shape[1:])

    def slices_of(self, shard: int) -> range:
        """The indices of a shard's slices."""
        first = shard * self.slices_per_shard
        return range(first, min(first + self.slices_per_shard, len(self)))

    def is_done(self, shard: int) -> bool:
        """True if every slice of the shard is written, with its checksum."""
        if shard not in self._known_done:
            try:
                marks = self._own("done", shard)
            except (FileNotFoundError, DamagedShardError):
                return False
            if not marks.all():
                return False
            self._known_done.add(shard)
        return shard in self._known_done

    def num_done(self, shards: range) -> int:
        """The number of slices in finished shards among these, over all processes."""
        folder = self.folder / "done" / "c"
        begun = set(os.listdir(folder)) if folder.is_dir() else set()
        done = (s for s in shards if s in self._known_done or (str(s) in begun and self.is_done(s)))
        return sum(len(self.slices_of(shard)) for shard in done)

    def write_shard(self, shard: int, keys: Sequence[str], values: Mapping[str, Array]) -> None:
        """Write one whole shard, `done` last; the caller is its only writer."""
        slice_indices = self.slices_of(shard)
        if len(keys) != len(slice_indices) or set(values) != set(self.names):
            raise ValueError(
                f"shard {shard} takes {len(slice_indices)} slices of {self.names}, "
                f"got {len(keys)} of {sorted(values)}"
            )
        stored = {
            name: np.ascontiguousarray(values[name], dtype=self._array(name).dtype)
            for name in self.names
        }
        self.discard(shard)
        for name, value in stored.items():
            self._write(name, shard, value)
        self._write("key", shard, np.stack([encoded_key(key) for key in keys]))
        marks = [
            _checksum([stored[name][i] for name in self.names]) + 1
            for i in range(len(slice_indices))
        ]
        self._write("done", shard, np.array(marks, dtype=np.uint64))

    def discard(self, shard: int) -> None:
        """Delete a shard; the caller is its only writer."""
        for name in ("done", "key", *self.names):
            remove(self._path(name, shard))
            self._mapped.pop((name, shard), None)
        self._known_done.discard(shard)

    def read(self, name: str, slice_index: int) -> Array:
        """One slice of an array, as stored, read-only.

        Raises KeyError for an unknown array, RuntimeError where the slice was never written, and
        DamagedShardError (a ValueError) where its bytes are lost or changed.
        """
        shard, place = divmod(slice_index, self.slices_per_shard)
        stamped = self._mapped.get((name, shard))
        if stamped is None or _stamp(self._file(name, shard)[0]) != stamped[0]:
            return self._map(name, shard).chunk(place)
        return stamped[1].chunk(place)

    def scale(self, tap: str, slice_index: int) -> npt.NDArray[np.float32] | None:
        """The scale (levels, channels) of a tap's stored integers; None for floats."""
        return self.read(tap + SCALE, slice_index) if tap + SCALE in self.names else None

    def damaged_slices(self, shard: int, keys: Sequence[str] | None = None) -> list[int]:
        """The indices of a shard's slices that are lost or fail their checksum.

        With `keys`, those of all slices, also the slices whose stored key differs.
        """
        slice_indices = self.slices_of(shard)
        try:
            marks = self._own("done", shard)
            stored = self._own("key", shard)
        except (FileNotFoundError, DamagedShardError):
            return list(slice_indices)
        return [
            slice_index
            for place, slice_index in enumerate(slice_indices)
            if not self._is_intact(slice_index, int(marks[place]))
            or (keys is not None and bytes(stored[place]) != bytes(encoded_key(keys[slice_index])))
        ]

    def _is_intact(self, slice_index: int, mark: int) -> bool:
        try:
            return _checksum([self.read(name, slice_index) for name in self.names]) + 1 == mark
        except (DamagedShardError, RuntimeError):  # lost, changed, or never written
            return False

    def verify(self, slice_index: int) -> bool:
        """True if the slice's bytes match their checksum."""
        return slice_index not in self.damaged_slices(slice_index // self.slices_per_shard)

    def column(self, name: str) -> Array:
        """The whole of a small array (labels, probabilities); zeros for slices not yet written."""
        shape, dtype = self.slice_shape(name), self._array(name).dtype
        result = np.zeros((len(self), *shape), dtype)
        for shard in filter(self.is_done, range(self.num_shards)):
            slice_indices = self.slices_of(shard)
            if name in OWN:
                result[slice_indices.start : slice_indices.stop] = self._own(name, shard)
            else:
                for slice_index in slice_indices:
                    result[slice_index] = self.read(name, slice_index)
        return result

    @property
    def keys(self) -> list[str]:
        """The key of every slice; empty for those not yet written."""
        return [bytes(slice_index).rstrip(b"\0").decode() for slice_index in self.column("key")]

    def sweep(self, shards: Iterable[int]) -> int:
        """Remove the temporary files of killed writers of these shards; returns their number."""
        count = 0
        for shard in shards:
            for name in ("done", "key", *self.names):
                path = self._path(name, shard)
                for partial in path.parent.glob(f"*{path.name}.*partial"):
                    if partial.name.lstrip(".").split(".")[0] == path.name:
                        partial.unlink(missing_ok=True)
                        count += 1
        return count

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            if name not in self.names and name not in OWN:
                raise KeyError(
                    f"{self.folder} holds no array {name!r}; it has {', '.join(self.names)}"
                )
            try:
                self._arrays[name] = self._group[name]
            except Exception as error:  # zarr's own errors have no common kind
                raise DamagedShardError(
                    f"{self.folder / name / 'zarr.json'} is lost or damaged: "
                    f"{' '.join(str(error).split())}; {REPAIR}"
                ) from error
        return self._arrays[name]

    def _path(self, name: str, shard: int) -> Path:
        return self._file(name, shard)[1]

    def _file(self, name: str, shard: int) -> tuple[str, Path]:
        if (name, shard) not in self._files:
            rank = len(self._array(name).shape) - 1
            path = self.folder / name / "c" / "/".join([str(shard), *["0"] * rank])
            self._files[name, shard] = (str(path), path)
        return self._files[name, shard]

    def _map(self, name: str, shard: int) -> MappedShard:
        """The shard's file, mapped again."""
        self._known_done.discard(shard)
        self._mapped.pop((name, shard), None)
        self._check_done(name, shard)
        return self._mapped_file(name, shard)

    def _check_done(self, name: str, shard: int) -> None:
        self._array(name)
        if not self.is_done(shard):
            first, last = self.slices_of(shard)[0], self.slices_of(shard)[-1]
            raise RuntimeError(
                f"slices {first} to {last} of {self.folder} were never written; run: cldf cache "
                f"CONFIG (and if the stage is finished, {REPAIR})"
            )

    def _own(self, name: str, shard: int) -> Array:
        """`key` or `done` of a whole shard; raises FileNotFoundError where it was not written."""
        array = self._array(name)
        count = len(self.slices_of(shard))
        try:
            return read_shard_file(
                self._path(name, shard), self.slices_per_shard, count, array.shape[1:], array.dtype
            )
        except FileNotFoundError as error:
            if name == "done":
                raise
            raise DamagedShardError(f"{self._path(name, shard)} is lost; {REPAIR}") from error

    def _mapped_file(self, name: str, shard: int) -> MappedShard:
        array, (text, path) = self._array(name), self._file(name, shard)
        try:
            stamp = _stamp(text)  # before it is mapped: a file replaced in between is read again
            mapped = MappedShard(path, self.slices_per_shard, array.shape[1:], array.dtype)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path} is lost; {REPAIR}") from error
        while len(self._mapped) >= MOST_MAPPED:
            del self._mapped[next(iter(self._mapped))]
        self._mapped[name, shard] = (stamp or (0, 0, 0), mapped)
        return mapped

    def _write(self, name: str, shard: int, values: Array) -> None:
        write_shard_file(self._path(name, shard), values, self.slices_per_shard)


def _stamp(path: str) -> Stamp | None:
    """Inode, time and size, which change when a file is replaced; None without a file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _checksum(parts: Sequence[Array]) -> int:
    checksum = 0
    for part in parts:
        checksum = google_crc32c.extend(checksum, as_bytes(np.ascontiguousarray(part)))
    return checksum
