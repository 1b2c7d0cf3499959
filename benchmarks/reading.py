"""Readers of the same data in several forms, timed with their pages in memory and without."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import cpu_and_wall, medians

COLD, WARM = "cold", "warm"
# the kernel passes over pages that another processor has just touched
ATTEMPTS, PAUSE_SECONDS = 10, 0.05


@dataclass(frozen=True)
class Reader:
    """Reads all of the data once.

    `start` opens what a training opens once, index or manifest; what it returns does the reading,
    and gives a number that depends on every slice.
    """

    name: str
    files: Sequence[Path]
    start: Callable[[], Callable[[], int]]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def measure_readers(
    readers: Sequence[Reader], states: Sequence[str], rounds: int
) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Median seconds (of the processor, of the wall), by state of the pages, then by reader.

    A reader whose pages cannot be dropped from memory is missing where they should be cold; all
    are where the first, to which the others are compared, is one of those.
    """
    for reader in readers:
        reader.start()()  # into memory, and every cache of the libraries filled
    found: dict[str, dict[str, list[tuple[float, float]]]] = {state: {} for state in states}
    for _ in range(rounds):
        for reader in readers:
            for state in states:
                if state == WARM or _forget_pages(reader.files):
                    laps = found[state].setdefault(reader.name, [])
                    laps.append(cpu_and_wall(reader.start()))
    for state in states:
        for name in {reader.name for reader in readers} - set(found[state]):
            print(f"{name}, {state}: left out, its pages cannot be dropped from memory")
        if readers[0].name not in found[state]:
            found[state] = {}
    return {
        state: {name: medians(laps) for name, laps in by_name.items()}
        for state, by_name in found.items()
    }


def _forget_pages(files: Sequence[Path]) -> bool:
    """Drop the files from the page cache; False where the file system keeps them."""
    gc.collect()  # mapped files stay in memory
    os.sync()  # and so does what is not written yet
    for _ in range(ATTEMPTS):
        kept = [path for path in files if not _forget(path)]
        if not kept:
            return True
        time.sleep(PAUSE_SECONDS)
    return False


def _forget(path: Path) -> bool:
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.suppress(BlockingIOError):  # it would have to wait for the disk
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            return False
    return True
