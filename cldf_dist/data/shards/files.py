"""The open files of shards: of a local folder, or staged copies of remote ones."""

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.data.shards.remote import ManifestEntry, RemoteShards
from cldf_dist.system.files import DamagedShardError

MAX_OPEN_FILES = 64  # per process and table
NUM_PROBES = 16  # of a file, whether it is in memory
MAX_OPEN_STAGED = 4  # a window of the stream: an open file keeps its disk space when it is evicted
REMEDY = "delete the folder and prepare the data again, or set data.on_damaged=skip"


class ShardFiles:
    """The most recently read shards, kept open; a pickled copy opens its own."""

    def __init__(
        self, folder: Path, shards: Sequence[ManifestEntry], remote: RemoteShards | None
    ) -> None:
        about = ("name", "size", "sha256")  # the samples are the table's
        self._folder, self._remote = folder, remote
        self._shards = [{key: shard[key] for key in about} for shard in shards]
        self._max_open = MAX_OPEN_STAGED if remote else MAX_OPEN_FILES
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._scratch = np.empty(0, np.uint8)
        self._damaged: dict[int, DamagedShardError] = {}  # fetched once, not for every slice

    def scratch(self, length: int) -> npt.NDArray[np.uint8]:
        """A reused buffer to read into: faulting in new pages would cost more than reading."""
        if len(self._scratch) < length:
            self._scratch = np.empty(length, np.uint8)
        return self._scratch[:length]

    def read(self, shard: int, offset: int, buffers: Sequence[Any]) -> int:
        """Fill the buffers from the file; returns the number of bytes read."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
        self._descriptors.move_to_end(shard)
        return os.preadv(descriptor, buffers, offset)

    def drop_copy(self, shard: int) -> bool:
        """Remove a staged copy that has become damaged; returns False for a local shard."""
        if self._remote is None:
            return False
        path = self.path(shard)
        print(f"warning: {path} has become damaged and is fetched again", file=sys.stderr)
        path.unlink(missing_ok=True)
        os.close(self._descriptors.pop(shard))
        return True

    def path(self, shard: int) -> Path:
        """The path of the file, for errors; of a remote shard that of its copy."""
        record = self._shards[shard]
        return self._remote.cache.path(record) if self._remote else self._folder / record["name"]

    def _open(self, shard: int) -> int:
        if len(self._descriptors) >= self._max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor = self._opened(shard)
        _read_ahead(descriptor)
        return descriptor

    def _opened(self, shard: int) -> int:
        if self._remote is None:
            try:
                return os.open(self.path(shard), os.O_RDONLY)
            except FileNotFoundError:
                raise DamagedShardError(f"{self.path(shard)} is missing; {REMEDY}") from None
        if shard in self._damaged:
            raise self._damaged[shard]
        try:
            return self._remote.open(self._shards[shard])
        except DamagedShardError as error:
            self._damaged[shard] = error
            raise

    def __reduce__(self) -> tuple[type["ShardFiles"], tuple[Any, ...]]:
        return ShardFiles, (self._folder, self._shards, self._remote)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _read_ahead(descriptor: int) -> None:
    """Read the whole file into the page cache at once, unless probes find it there.

    Slices are read in random order. That alone would fill the cache with single pages, from which
    Linux copies at half the speed, now and in every later epoch.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        size, probe = os.fstat(descriptor).st_size, [bytearray(1)]
        for offset in range(0, size, max(size // NUM_PROBES, 1)):
            os.preadv(descriptor, probe, offset, os.RWF_NOWAIT)  # raises where it would wait
        return
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        offset = 0
        while num_sent := os.sendfile(nowhere.fileno(), descriptor, offset, 2**30):
            offset += num_sent
