"""The file of one zarr v3 shard, written and read without zarr: one uncompressed chunk a slice.

The file is what zarr's sharding codec defines: the chunks, each followed by its crc32c, then an
index of (offset, length) as little-endian uint64 for every chunk, and the index's own crc32c. zarr
and tensorstore read it; read through the page cache it costs a small part of what they take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from cldf_dist.whole_files import whole_file

Array = npt.NDArray[Any]
ABSENT = 2**64 - 1  # offset and length of a chunk that was not written
CHECKSUM_BYTES = 4
REPAIR = "run: cldf cache CONFIG cache.verify=true"
INDEX_ENTRY_BYTES = 16


class DamagedShardError(ValueError):
    """A shard's file is lost, cut or changed."""


class MappedShard:
    """Slices of one shard, read-only and without a copy; a checksum is verified on first touch.

    `shape` and `dtype` are those of one slice. Raises FileNotFoundError where there is no file,
    DamagedShardError where its index is cut or changed.
    """

    def __init__(
        self, path: Path, num_chunks: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.path = path
        self._shape, self._dtype = tuple(shape), dtype
        self._slices: dict[int, Array] = {}  # those whose checksum was verified
        with path.open("rb") as file:
            self._bytes: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
            if file.seek(0, 2):
                self._bytes = np.memmap(file, dtype=np.uint8, mode="r")
        # a plain array on the same memory: slicing a memmap costs ten times as much
        self._bytes = self._bytes.view(np.ndarray)
        tail = INDEX_ENTRY_BYTES * num_chunks + CHECKSUM_BYTES
        index = self._bytes[-tail:]
        if len(index) != tail or not _is_signed(index):
            raise DamagedShardError(f"{path} is damaged: its index is cut or changed; {REPAIR}")
        entries = index[:-CHECKSUM_BYTES].copy().view("<u8").reshape(num_chunks, 2)
        self._index: list[tuple[int, int]] = [(int(start), int(size)) for start, size in entries]

    def chunk(self, place: int) -> Array:
        """The slice at `place` of the shard. DamagedShardError where its bytes changed."""
        found = self._slices.get(place)
        return self._verified(place) if found is None else found

    def _verified(self, place: int) -> Array:
        start, size = self._index[place]
        if start == ABSENT:
            raise DamagedShardError(
                f"{self.path} does not hold slice {place} of the file; {REPAIR}"
            )
        signed = self._bytes[start : start + size]
        wanted = int(np.prod(self._shape)) * self._dtype.itemsize + CHECKSUM_BYTES
        if len(signed) != wanted or not _is_signed(signed):
            raise DamagedShardError(f"{self.path}, slice {place} of the file, is damaged; {REPAIR}")
        values: Array = np.frombuffer(signed[:-CHECKSUM_BYTES], self._dtype).reshape(self._shape)
        self._slices[place] = values
        return values


def write_shard_file(path: Path, values: Array, num_chunks: int) -> None:
    """Write `values` (slices, ...), at most `num_chunks` slices, as the file of one shard.

    The file appears whole, and on the disk, or not at all.
    """
    values = np.ascontiguousarray(values)
    index = np.full((num_chunks, 2), ABSENT, dtype="<u8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        for place, row in enumerate(values):
            content = as_bytes(row)
            index[place] = (file.tell(), len(content) + CHECKSUM_BYTES)
            file.write(content.data)
            file.write(_signature(content))
        file.write(as_bytes(index).data)
        file.write(_signature(as_bytes(index)))


def as_bytes(values: Array) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous array, read-only: what google_crc32c takes without a copy."""
    content = values.reshape(-1).view(np.uint8)
    content.flags.writeable = False
    return content


def _signature(content: npt.NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CHECKSUM_BYTES, "little")


def _is_signed(block: npt.NDArray[np.uint8]) -> bool:
    """True where the last four bytes are the crc32c of those before; the block is read-only."""
    checksum = int(google_crc32c.value(block[:-CHECKSUM_BYTES]))
    return checksum == int.from_bytes(block[-CHECKSUM_BYTES:].tobytes(), "little")
