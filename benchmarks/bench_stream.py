"""Processor time to read slices: ours against other formats and the floor, reading the bytes.

One process, alternating rounds, each cold (pages dropped from memory first) and warm; medians
count. Every reader gives the same int16 slices, ours with its crc32c verified; one more row is
what a training gets from it, float32 batches. One CSV row per reader and state is appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py
    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py --slices 2048 --image-size 128
"""

import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from harness import Benchmark
from made_up import write_tars
from reading import COLD, WARM, Reader, measure_readers

from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.slices import STEPS, dequantise
from cldf_dist.data.stream import LabelledSlices, Stream

# times and bytes are per slice; CPU time is user and system
COLUMNS = (
    *("date", "commit", "command", "device", "versions"),
    *("implementation", "pages", "slices", "channels", "image_size", "file_bytes"),
    *("cpu_ms", "ratio_to_floor", "wall_ms"),
)
PACKAGES = ("numpy", "torch", "webdataset", "litdata", "google-crc32c")
FLOOR = "read() of the tars"
BLOCK = 2**18  # bytes of the floor's buffer: it fits into the second-level cache
BATCH = 32


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


def main() -> None:
    """Write the slices in every form, measure, append the rows."""
    bench = Benchmark(__file__, __doc__, COLUMNS, PACKAGES)
    bench.numbers(
        slices=(512, "how many; multiples of 32 fill every batch"),
        channels=(4, "of a slice"),
        image_size=(224, "pixels"),
        slices_per_shard=(64, "and per chunk of LitData"),
        rounds=(9, "of which the median counts"),
    )
    bench.shared_options("folder")
    arguments = bench.parse()
    bench.begin()
    count = arguments.slices
    sizes = Sizes(count, arguments.channels, arguments.image_size, arguments.slices_per_shard)
    with bench.folder() as folder:
        readers = make_readers(folder, sizes)
        print(f"floor: {readers[0].num_bytes / count:.0f} bytes per slice of {sizes.shape}")
        found = measure_readers(readers, (COLD, WARM), arguments.rounds)
        for state, times in found.items():
            for reader in readers:
                if reader.name in times:
                    cpu, wall = times[reader.name]
                    bench.add(
                        implementation=reader.name,
                        pages=state,
                        slices=count,
                        channels=sizes.num_channels,
                        image_size=sizes.image_size,
                        file_bytes=round(reader.num_bytes / count),
                        cpu_ms=1000 * cpu / count,
                        ratio_to_floor=cpu / times[FLOOR][0],
                        wall_ms=1000 * wall / count,
                    )


def make_readers(folder: Path, sizes: Sizes) -> list[Reader]:
    """Write the slices in every form and return their readers, the floor first.

    LitData is left out, with a word, where it is not installed.
    """
    tars = folder / "shards"
    channels = [str(channel) for channel in range(sizes.num_channels)]
    write_tars(tars, map(dequantise, sizes.stored()), channels, sizes.slices_per_shard)
    files = sorted(tars.glob("*.tar"))
    readers = [
        Reader(FLOOR, files, lambda: lambda: _read_bytes(files)),
        Reader("webdataset", files, lambda: lambda: _read_webdataset(files)),
        _npy_files(folder / "npy", sizes),
        *_litdata(folder / "litdata", sizes),
        Reader("ours", files, lambda: _start_ours(tars, sizes)),
        Reader("ours, float32 batches", files, lambda: _start_batches(tars)),
    ]
    expected = readers[1].start()()
    for reader in readers[2:]:  # a reader that skips slices would be fast
        if reader.start()() != expected:
            raise RuntimeError(f"{reader.name} did not read the {sizes.num_slices} slices")
    return readers


def _read_bytes(files: list[Path]) -> int:
    total, buffer = 0, bytearray(BLOCK)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while taken := file.readinto(buffer):
                total += taken
    return total


def _read_webdataset(files: list[Path]) -> int:
    samples = webdataset.WebDataset([str(path) for path in files], shardshuffle=False)
    return sum(_first(np.load(io.BytesIO(sample["image.npy"]))) for sample in samples)


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


def _start_ours(folder: Path, sizes: Sizes) -> Callable[[], int]:
    """Verified stored arrays, in the order of an epoch, into memory that is there."""
    table, stream = _open(folder)
    out = np.empty(sizes.shape, np.int16)
    rows = [stream.position(number) for number in range(len(table))]
    return lambda: sum(_first(table.read_stored(row, out)) for row in rows)


def _start_batches(folder: Path) -> Callable[[], int]:
    """What a training gets: tensors of float32, collated, without augmentation and workers."""
    table, stream = _open(folder)
    size = BATCH if len(table) % BATCH == 0 else len(table)  # whole epochs alone
    batches = islice(stream.batches(0, batch_size=size), len(table) // size)
    firsts = (batch["image"][:, 0, 0, 0].tolist() for batch in batches)
    return lambda: sum(round(value * STEPS) for values in firsts for value in values)


def _open(folder: Path) -> tuple[SliceTable, Stream]:
    table = ShardSet(folder).split("train")
    items = LabelledSlices(table, None, 0)
    return table, Stream(items, items.groups, seed=0)


def _first(stored: npt.NDArray[Any]) -> int:
    return int(stored.flat[0])


if __name__ == "__main__":
    main()
