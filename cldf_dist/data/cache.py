"""FeatureCache: one zarr v3 group of per-slice arrays, cut so that every file has one writer.

A zarr shard that was never written reads as zeros without a word; `done` is what counts. It holds,
per slice, 1 + the crc32c of all its arrays' bytes, and is written after they are on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

Array = npt.NDArray[Any]
KEY_BYTES = 64  # zarr v3 strings are unstable: keys are fixed-width bytes
FORMAT = "cldf-features"
ABSENT = 2**64 - 1  # offset and length of a chunk that was not written
REPAIR = "delete the cache stage's folder and run: cldf cache CONFIG"


class FeatureCache:
    """Rows of features, maps, seeds, label and key, one row a slice.

    `names` are the stored arrays; `read(name, row)` gives one slice of one of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "zarr.json").is_file():
            raise FileNotFoundError(f"no feature cache at {self.folder}; run: cldf cache CONFIG")
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}
        self._shards: dict[tuple[str, int], MappedShard] = {}
        self._known_done: set[int] = set()  # shards never become undone
        self._attributes: dict[str, Any] = dict(self._opened().attrs)
        if self._attributes.get("format") != FORMAT:
            raise ValueError(f"{self.folder} is a zarr group, but not a {FORMAT} one")

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_group": None,
            "_arrays": {},
            "_shards": {},
        }  # reopened in the worker

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
        """An empty cache of `num_slices` rows; `arrays` gives shape and dtype of one row each."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        group = zarr.create_group(partial, zarr_format=3, attributes={
            "format": FORMAT, "version": 1, "num_slices": num_slices,
            "slices_per_shard": slices_per_shard, "arrays": list(arrays), **attributes,
        })  # fmt: skip
        own = {"key": ((KEY_BYTES,), "uint8"), "done": ((), "uint64")}
        for name, (shape, dtype) in {**arrays, **own}.items():
            group.create_array(
                name,
                shape=(num_slices, *shape),
                chunks=(1, *shape),
                shards=(slices_per_shard, *shape),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
            )
        partial.rename(folder)  # with all its arrays, or not there
        return cls(folder)

    def __len__(self) -> int:
        return int(self._attributes["num_slices"])

    @property
    def attributes(self) -> dict[str, Any]:
        return self._attributes

    @property
    def names(self) -> list[str]:
        return list(self._attributes["arrays"])

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.slices_per_shard)

    @property
    def slices_per_shard(self) -> int:
        return int(self._attributes["slices_per_shard"])

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one slice of an array."""
        return tuple(self._array(name).shape[1:])

    def rows_of(self, shard: int) -> range:
        first = shard * self.slices_per_shard
        return range(first, min(first + self.slices_per_shard, len(self)))

    def is_done(self, shard: int) -> bool:
        """True where every slice of the shard is written and signed."""
        if shard not in self._known_done:
            rows = self.rows_of(shard)
            if np.all(np.asarray(self._array("done")[rows.start : rows.stop]) > 0):
                self._known_done.add(shard)
        return shard in self._known_done

    def write_shard(self, shard: int, keys: Sequence[str], values: Mapping[str, Array]) -> None:
        """Write one whole shard; the caller is its only writer. `done` comes last."""
        rows = self.rows_of(shard)
        if len(keys) != len(rows) or set(values) != set(self.names):
            raise ValueError(
                f"shard {shard} takes {len(rows)} slices of {self.names}, "
                f"got {len(keys)} of {sorted(values)}"
            )
        stored = {
            name: np.ascontiguousarray(values[name], dtype=self._array(name).dtype)
            for name in self.names
        }
        for name in ("done", "key", *self.names):  # zarr reads what a killed writer left there
            self._path(name, shard).unlink(missing_ok=True)
            self._shards.pop((name, shard), None)
        self._known_done.discard(shard)
        for name, value in stored.items():
            self._array(name)[rows.start : rows.stop] = value
        self._array("key")[rows.start : rows.stop] = np.stack([_encoded(key) for key in keys])
        self._sync(shard)
        done = np.array(
            [_checksum([stored[name][i] for name in self.names]) + 1 for i in range(len(rows))],
            dtype=np.uint64,
        )
        self._array("done")[rows.start : rows.stop] = done

    def read(self, name: str, row: int) -> Array:
        """One slice of an array. RuntimeError where it was never written, ValueError if damaged."""
        if name not in self.names:
            raise KeyError(f"{self.folder} holds no array {name!r}; it has {', '.join(self.names)}")
        if not self.is_done(row // self.slices_per_shard):
            raise RuntimeError(
                f"slice {row} of {self.folder} was never written; run: cldf cache CONFIG"
            )
        shard, place = divmod(row, self.slices_per_shard)
        return self._shard(name, shard).chunk(place)

    def verify(self, row: int) -> bool:
        """True where the slice's bytes are those that were signed."""
        try:
            checksum = _checksum([self.read(name, row) for name in self.names])
        except (ValueError, RuntimeError):
            return False
        return checksum + 1 == int(np.asarray(self._array("done")[row]))

    def column(self, name: str) -> Array:
        """A small array (labels, probabilities) whole."""
        return np.asarray(self._array(name)[:])

    @property
    def keys(self) -> list[str]:
        return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(self._array("key")[:])]

    def sweep(self) -> int:
        """Remove what killed writers left behind; the number of files."""
        stale = list(self.folder.rglob("*.partial"))
        for path in stale:
            path.unlink()
        return len(stale)

    def _opened(self) -> zarr.Group:
        if self._group is None:
            self._group = zarr.open_group(self.folder, mode="r+", zarr_format=3)
        return self._group

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._opened()[name]
        return self._arrays[name]

    def _shard(self, name: str, shard: int) -> MappedShard:
        if (name, shard) not in self._shards:
            array = self._array(name)
            mapped = MappedShard(
                self._path(name, shard), self.slices_per_shard, array.shape[1:], array.dtype
            )
            self._shards[name, shard] = mapped
            if mapped.is_absent and not all(self.verify(row) for row in self.rows_of(shard)):
                del self._shards[name, shard]
                raise ValueError(f"{mapped.path} is lost: its slices were not all zeros; {REPAIR}")
        return self._shards[name, shard]

    def _path(self, name: str, shard: int) -> Path:
        rank = len(self._array(name).shape) - 1
        return self.folder / name / "c" / "/".join([str(shard), *["0"] * rank])

    def _sync(self, shard: int) -> None:
        for name in (*self.names, "key"):
            path = self._path(name, shard)
            if not path.exists():
                continue  # zarr leaves a shard of nothing but zeros out
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


class MappedShard:
    """An uncompressed zarr v3 shard read through the page cache: one chunk a slice, no copy.

    The file ends with its index, (offset, length) as little-endian uint64 for each chunk and a
    crc32c; each chunk ends with its own crc32c, checked the first time this process touches it.
    A file that does not exist stands for zeros, as zarr leaves such shards out.
    """

    def __init__(
        self, path: Path, num_chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self._verified: set[int] = set()
        self._bytes: npt.NDArray[np.uint8] | None = None
        self.is_absent = not path.exists()
        if self.is_absent:
            return
        tail = 16 * num_chunks + 4
        whole = path.stat().st_size >= tail
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if whole else np.zeros(0, np.uint8)
        index = np.array(self._bytes[-tail:])
        if not whole or not _is_signed(index):
            raise ValueError(f"{path} is damaged: its index is cut or changed; {REPAIR}")
        self._index = index[:-4].view("<u8").reshape(num_chunks, 2)

    def chunk(self, place: int) -> Array:
        """The slice at `place` of the shard, read-only. ValueError where its bytes changed."""
        if self._bytes is None:
            return np.zeros(self.shape, self.dtype)
        offset, length = (int(number) for number in self._index[place])
        if offset == ABSENT:  # a chunk of nothing but zeros
            return np.zeros(self.shape, self.dtype)
        signed = self._bytes[offset : offset + length]
        if place not in self._verified:
            if not _is_signed(signed):
                raise ValueError(f"{self.path}, slice {place} of the file, is damaged; {REPAIR}")
            self._verified.add(place)
        return signed[:-4].view(self.dtype).reshape(self.shape)


def _is_signed(block: npt.NDArray[np.uint8]) -> bool:
    """True where the last four bytes are the crc32c of those before."""
    return int(google_crc32c.value(block[:-4].tobytes())) == int(block[-4:].copy().view("<u4")[0])


def _encoded(key: str) -> npt.NDArray[np.uint8]:
    raw = key.encode()
    if len(raw) > KEY_BYTES:
        raise ValueError(f"slice key {key!r} has {len(raw)} bytes; the cache takes {KEY_BYTES}")
    return np.frombuffer(raw.ljust(KEY_BYTES, b"\0"), dtype=np.uint8)


def _checksum(parts: Sequence[Array]) -> int:
    checksum = google_crc32c.Checksum()
    for part in parts:
        checksum.update(np.ascontiguousarray(part).tobytes())
    return int.from_bytes(checksum.digest(), "big")
