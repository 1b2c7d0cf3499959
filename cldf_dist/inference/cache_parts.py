"""The division of the feature cache's shards among processes and jobs, and their repair."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from cldf_dist.config import Config
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.runs.run import write_atomically
from cldf_dist.system.distributed import fail_on_all_ranks, gather_objects, processes
from cldf_dist.system.locks import FolderLock

STAGE = "cache"
STORE = "features.zarr"
COUNT_FILE = ".parts.json"
SHARDS_AT_ONCE = 64  # that one reading process gets, at most
SHOWN = 20  # damaged slices that are named


def store_folder(config: Config) -> Path:
    """The folder of the run's feature store."""
    return config.run_folder / STAGE / STORE


def part_of(shards: range, part: str) -> range:
    """The contiguous part "i/n" of shards, 1 <= i <= n; all of them for ""."""
    if not part:
        return shards
    number, count = (int(word) for word in part.split("/"))
    return _part(shards, number - 1, count)


def shards_of_this_rank(shards: range) -> range:
    """This process's contiguous part of the shards."""
    return _part(shards, processes().rank, processes().world_size)


def _part(shards: range, number: int, count: int) -> range:
    return shards[len(shards) * number // count : len(shards) * (number + 1) // count]


@contextmanager
def shared_stage(config: Config) -> Iterator[None]:
    """Hold a shared lock on the stage's folder, for one job of an array.

    Raises RuntimeError while a job computes the whole cache, or jobs compute another number of
    parts: two of them would write the same files.
    """
    folder, count = config.run_folder / STAGE, config.cache.part.split("/")[1]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / COUNT_FILE
    lock = FolderLock.shared(
        folder, lambda: write_atomically(file, json.dumps({"parts": int(count)}))
    )
    try:
        at_work = json.loads(file.read_text())["parts"]
        if at_work != int(count):
            raise RuntimeError(
                f"cache.part={config.cache.part}: jobs with cache.part=i/{at_work} are running in "
                f"{folder}; wait for them, or use i/{at_work}"
            )
        yield
    finally:
        lock.release()


def repair(config: Config, cache: FeatureCache, keys: Sequence[str]) -> list[str]:
    """Verify every byte and discard damaged shards, so that the cache stage computes them again.

    Each process verifies its part. `keys` are those of all slices; returns the keys of the damaged
    ones, on every process.
    """
    with fail_on_all_ranks():
        shards = shards_of_this_rank(range(cache.num_shards))
        mine = damaged_slices(cache.folder, shards, keys, config.cache.verify_processes)
        for shard in mine:
            cache.discard(shard)
    found = {
        number: slice_indices
        for part in gather_objects(mine)
        for number, slice_indices in part.items()
    }
    damaged = [keys[slice_index] for shard in sorted(found) for slice_index in found[shard]]
    if processes().is_main:
        said = f"{len(damaged)} of {len(cache)} slices are damaged or missing"
        shown = ", ".join(damaged[:SHOWN]) + (", ..." if len(damaged) > SHOWN else "")
        again = f" ({shown}); {len(found)} shards are computed again" if damaged else ""
        print(f"cache: {said}{again}", file=sys.stderr, flush=True)
    return damaged


def damaged_slices(
    folder: Path, shards: range, keys: Sequence[str], num_processes: int
) -> dict[int, list[int]]:
    """The indices of slices whose bytes are missing or fail their checksum, by shard.

    Several processes read at once. `keys` are those of all slices.
    """
    size = max(min(len(shards) // (2 * num_processes), SHARDS_AT_ONCE), 1)
    pieces = [shards[start : start + size] for start in range(0, len(shards), size)]
    workers = min(num_processes, len(pieces))
    if workers < 2:
        parts = [_damaged(folder, piece, keys) for piece in pieces]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(_damaged, repeat(folder), pieces, repeat(keys)))
    return {shard: slice_indices for part in parts for shard, slice_indices in part.items()}


def _damaged(folder: Path, shards: range, keys: Sequence[str]) -> dict[int, list[int]]:
    cache = FeatureCache(folder)
    found = {shard: cache.damaged_slices(shard, keys) for shard in shards}
    return {shard: slice_indices for shard, slice_indices in found.items() if slice_indices}
