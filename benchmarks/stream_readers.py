"""The readers that the stream benchmark compares: the same slices, each in its own form on disk."""

import contextlib
import gc
import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset

from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import STEPS, Slice, dequantise
from cldf_dist.data.stream import LabelledSlices, Stream

FLOOR = "read() of the tars"
NAMES = (FLOOR, "webdataset", "npy files", "LitData", "ours", "ours, float32 batches")
BLOCK = 2**18  # bytes of the floor's buffer: it fits into the second-level cache
BATCH = 32
# the kernel passes over pages that another processor has just touched
ATTEMPTS, PAUSE_SECONDS = 10, 0.05
COLD, WARM = "cold", "warm"


@dataclass(frozen=True)
class Sizes:
    """How many slices of what size, and how they are packed."""

    num_slices: int
    num_channels: int
    image_size: int
    slices_per_shard: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.num_channels, self.image_size, self.image_size)

    def stored(self) -> Iterator[npt.NDArray[np.int16]]:
        """The slices: noise, since nothing here compresses; never below -1 of the range."""
        source = np.random.default_rng(0)
        for _ in range(self.num_slices):
            yield source.integers(-STEPS, STEPS, self.shape, np.int16, endpoint=True)


@dataclass
class Reader:
    """Reads every slice once.

    `start` opens what a training opens once, index or manifest; what it returns does the reading,
    and gives a number that depends on every slice.
    """

    name: str
    files: list[Path]
    start: Callable[[], Callable[[], int]]
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def measure(self, state: str) -> None:
        """One reading, its processor time (user and system) and its wall time remembered."""
        read = self.start()
        wall, cpu = time.perf_counter(), time.process_time()
        read()
        taken = (time.process_time() - cpu, time.perf_counter() - wall)
        self.seconds.setdefault(state, []).append(taken)

    def medians(self, state: str) -> tuple[float, float]:
        """Seconds of processor and of wall."""
        cpu, wall = zip(*self.seconds[state], strict=True)
        return statistics.median(cpu), statistics.median(wall)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def forget_pages(self) -> bool:
        """Drop the files from the page cache; False where the file system keeps them."""
        gc.collect()  # mapped files stay in memory
        os.sync()  # and so does what is not written yet
        for _ in range(ATTEMPTS):
            kept = [path for path in self.files if not _forget(path)]
            if not kept:
                return True
            time.sleep(PAUSE_SECONDS)
        return False


def make_readers(folder: Path, sizes: Sizes) -> list[Reader]:
    """Write the slices in every form and return their readers, the floor first.

    LitData is left out, with a word, where it is not installed.
    """
    tars = folder / "shards"
    _write_tars(tars, sizes)
    readers = [
        _floor(tars),
        _webdataset(tars),
        _npy_files(folder / "npy", sizes),
        *_litdata(folder / "litdata", sizes),
        _ours(tars, sizes.shape),
        _float32_batches(tars),
    ]
    for reader in readers:  # a reader that skips slices would be fast
        _check(reader, readers[1].start()(), sizes)
    return readers


def _check(reader: Reader, expected: int, sizes: Sizes) -> None:
    if reader.name != FLOOR and reader.start()() != expected:
        raise RuntimeError(f"{reader.name} did not read the {sizes.num_slices} slices it was given")


def _write_tars(folder: Path, sizes: Sizes) -> None:
    slices = (
        Slice(f"case_{index:06d}", "case", index, index % 2, dequantise(stored), None)
        for index, stored in enumerate(sizes.stored())
    )
    write_manifest(
        folder,
        settings={},
        channels=[str(channel) for channel in range(sizes.num_channels)],
        splits={"train": ["case"]},
        geometry={},
        shards=write_shards(folder, "train", slices, sizes.slices_per_shard),
    )


def _floor(folder: Path) -> Reader:
    files = sorted(folder.glob("*.tar"))
    buffer = bytearray(BLOCK)

    def read() -> int:
        total = 0
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while taken := file.readinto(buffer):
                    total += taken
        return total

    return Reader(FLOOR, files, lambda: read)


def _webdataset(folder: Path) -> Reader:
    files = sorted(folder.glob("*.tar"))

    def read() -> int:
        samples = webdataset.WebDataset([str(path) for path in files], shardshuffle=False)
        return sum(_first(np.load(io.BytesIO(sample["image.npy"]))) for sample in samples)

    return Reader("webdataset", files, lambda: read)


def _npy_files(folder: Path, sizes: Sizes) -> Reader:
    folder.mkdir()
    files = [folder / f"{index:06d}.npy" for index in range(sizes.num_slices)]
    for path, stored in zip(files, sizes.stored(), strict=True):
        np.save(path, stored)
    order = np.random.default_rng(0).permutation(len(files))

    def read() -> int:
        return sum(_first(np.load(files[position])) for position in order)

    return Reader("npy files", files, lambda: read)


def _litdata(folder: Path, sizes: Sizes) -> list[Reader]:
    if importlib.util.find_spec("litdata") is None:
        print("LitData: left out, litdata is not installed")
        return []
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_size=sizes.slices_per_shard)
    for index, stored in enumerate(sizes.stored()):
        cache[index] = {"image": stored, "label": index % 2}
    cache.done()
    cache.merge(1)

    def start() -> Callable[[], int]:
        dataset = StreamingDataset(str(folder))
        return lambda: sum(_first(item["image"]) for item in dataset)

    return [Reader("LitData", sorted(folder.glob("*.bin")), start)]


def _ours(folder: Path, shape: tuple[int, int, int]) -> Reader:
    """Verified stored arrays, in the order of an epoch, into memory that is there."""

    def start() -> Callable[[], int]:
        table, stream = _open(folder)
        out = np.empty(shape, np.int16)
        rows = [stream.position(number) for number in range(len(table))]
        return lambda: sum(_first(table.read_stored(row, out)) for row in rows)

    return Reader("ours", sorted(folder.glob("*.tar")), start)


def _float32_batches(folder: Path) -> Reader:
    """What a training gets: tensors of float32, collated, without augmentation and workers."""

    def start() -> Callable[[], int]:
        table, stream = _open(folder)
        size = BATCH if len(table) % BATCH == 0 else len(table)  # whole epochs alone
        batches = islice(stream.batches(0, batch_size=size), len(table) // size)
        firsts = (batch["image"][:, 0, 0, 0].tolist() for batch in batches)
        return lambda: sum(round(value * STEPS) for values in firsts for value in values)

    return Reader("ours, float32 batches", sorted(folder.glob("*.tar")), start)


def _open(folder: Path) -> tuple[SliceTable, Stream]:
    table = ShardSet(folder).split("train")
    items = LabelledSlices(table, None, 0)
    return table, Stream(items, items.groups, seed=0)


def _first(stored: npt.NDArray[np.int16]) -> int:
    return int(stored.flat[0])


def _forget(path: Path) -> bool:
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.suppress(BlockingIOError):  # it would have to wait for the disk
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            return False
    return True
