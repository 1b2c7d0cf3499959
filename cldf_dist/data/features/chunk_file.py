"""The file of one zarr v3 shard, written and read without zarr: one uncompressed chunk a slice.

The format is that of zarr's sharding codec: the chunks, each followed by its crc32c, then an index
of (offset, length) as little-endian uint64 for every chunk, and the index's own crc32c. zarr and
tensorstore can read it; reading it through the page cache takes a small part of their time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from cldf_dist.data.features.memory_map import map_file
from cldf_dist.system.files import DamagedShardError, atomic_write

Array = npt.NDArray[Any]
ABSENT = 2**64 - 1  # offset and length of a chunk that was not written
CHECKSUM_BYTES = 4
REPAIR = "run: cldf cache CONFIG cache.verify=true"
INDEX_ENTRY_BYTES = 16


class MappedShard:
    """The slices of one shard, memory-mapped and read-only; checksums are verified on first use.

    `shape` and `dtype` are those of one slice. Raises FileNotFoundError where there is no file,
    DamagedShardError where its index is truncated or changed.
    """

    def __init__(
        self, path: Path, num_chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.path = path
        self._shape, self._dtype = tuple(shape), dtype
        self._slices: dict[int, Array] = {}  # those whose checksum was verified
        with _problems_explained(path):
            self._bytes = map_file(path)
        self._index = _index(self._bytes, num_chunks, path)

    def chunk(self, place: int) -> Array:
        """The slice at `place` of the shard; raises DamagedShardError where its bytes changed."""
        found = self._slices.get(place)
        return self._verified(place) if found is None else found

    def _verified(self, place: int) -> Array:
        values = _chunk(self._bytes, self._index, place, (self._shape, self._dtype), self.path)
        self._slices[place] = values
        return values


def read_shard_file(
    path: Path, num_chunks: int, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """The first `count` slices of a small shard, (count, *shape), verified.

    Raises FileNotFoundError where there is no file, DamagedShardError where it is truncated or
    changed.
    """
    with _problems_explained(path):
        content = np.frombuffer(path.read_bytes(), np.uint8)
    index = _index(content, num_chunks, path)
    return np.stack([_chunk(content, index, i, (shape, dtype), path) for i in range(count)])


def write_shard_file(path: Path, values: Array, num_chunks: int) -> None:
    """Write `values` (slices, ...), at most `num_chunks` slices, as the file of one shard.

    The file is written atomically and synced to the disk.
    """
    values = np.ascontiguousarray(values)
    index = np.full((num_chunks, 2), ABSENT, dtype="<u8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for place, row in enumerate(values):
            content = as_bytes(row)
            index[place] = (file.tell(), len(content) + CHECKSUM_BYTES)
            file.write(content.data)
            file.write(_signature(content))
        file.write(as_bytes(index).data)
        file.write(_signature(as_bytes(index)))


def remove(path: Path) -> None:
    """Remove a shard's file, or whatever is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _problems_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        raise DamagedShardError(f"{path} is a folder, not a file; {REPAIR}") from error
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be read: {error.strerror}; chmod u+r it") from error


def _index(content: npt.NDArray[np.uint8], num_chunks: int, path: Path) -> list[tuple[int, int]]:
    tail = INDEX_ENTRY_BYTES * num_chunks + CHECKSUM_BYTES
    index = content[-tail:]
    if len(index) != tail or not _is_signed(index):
        raise DamagedShardError(f"{path} is damaged: its index is truncated or changed; {REPAIR}")
    entries = index[:-CHECKSUM_BYTES].copy().view("<u8").reshape(num_chunks, 2)
    return [(int(start), int(size)) for start, size in entries]


def _chunk(
    content: npt.NDArray[np.uint8],
    index: list[tuple[int, int]],
    place: int,
    form: tuple[tuple[int, ...], np.dtype[Any]],
    path: Path,
) -> Array:
    start, size = index[place]
    if start == ABSENT:
        raise DamagedShardError(f"{path} does not hold slice {place}; {REPAIR}")
    shape, dtype = form
    signed = content[start : start + size]
    wanted = math.prod(shape) * dtype.itemsize + CHECKSUM_BYTES
    if len(signed) != wanted or not _is_signed(signed):
        raise DamagedShardError(f"{path}, slice {place} of the file, is damaged; {REPAIR}")
    values: Array = np.frombuffer(signed[:-CHECKSUM_BYTES], dtype).reshape(shape)
    return values


def as_bytes(values: Array) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous array as read-only bytes, which google_crc32c does not copy."""
    content = values.reshape(-1).view(np.uint8)
    content.flags.writeable = False
    return content


def _signature(content: npt.NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CHECKSUM_BYTES, "little")


def _is_signed(block: npt.NDArray[np.uint8]) -> bool:
    """True if the last four bytes are the crc32c of those before; the block must be read-only."""
    checksum = int(google_crc32c.value(block[:-CHECKSUM_BYTES]))
    return checksum == int.from_bytes(block[-CHECKSUM_BYTES:].tobytes(), "little")
