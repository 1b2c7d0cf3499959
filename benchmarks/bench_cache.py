"""The cache of features: its bytes, its readers against others, and the decoder trained from it.

Parts: bytes of a written store against the least that its features take (sizes); writing, a random
slice and 64 random pixels of one, against np.memmap, h5py, safetensors, zarr-python and tensorstore
(read); steps of the decoder with pixels gathered in the loader, against whole maps upsampled
(decoder). One process, one thread, alternating rounds, medians; warm, and cold as far as
posix_fadvise drops pages from memory: the disk's own memory is not emptied. Rows are appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_cache.py
    OMP_NUM_THREADS=1 python benchmarks/bench_cache.py --parts read --rounds 9
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cache_reading
import numpy as np
import torch
from cache_formats import Sizes
from cases import BRATS, DEBUG, GUIDED_DIFFUSION, SMALL, Case, meta_net
from cldf_kernels import supcon_loss
from harness import ABOUT, Benchmark
from made_up import decoder_net, fill_store, seed_pixels, write_store
from measure import alternate, cpu_and_wall, folder_bytes
from torch import Tensor
from torch.nn import functional

from cldf_dist.config import Config
from cldf_dist.data.features.encoding import STORAGES
from cldf_dist.data.features.pixels import SeedPixels
from cldf_dist.data.features.store import SCALE, FeatureCache
from cldf_dist.data.stream import Stream
from cldf_dist.inference.feature_extraction import slice_shapes
from cldf_dist.tasks.contrast import Contrast

COLUMNS = (
    *ABOUT,
    "part",
    "config",  # of the net, or the shape of a slice: levels x height x width x channels
    *("measure", "implementation", "pages", "slices", "rounds"),
    *("cpu_ms", "wall_ms"),  # user and system; of a slice, or of a step
    "ratio",  # of bytes to the least, or of CPU time to np.memmap or to the naive form
    "bytes_per_slice",  # on the disk
    "least_bytes",  # sum over taps of channels x height x width x 2 x stored timesteps
    *("mb_per_slice", "tb_per_100000_slices"),  # 1e6 bytes, 1e12 bytes
    "steps_per_second",
    "loader_fraction",  # of the wall time of a step
)
GATHERED, NAIVE = "pixels gathered in the loader", "naive full maps"
HARD = "pixels gathered in the loader, half of the background hard"
LOSS_TOLERANCE = 1e-4  # relative, of one form to the other
PACKAGES = ("numpy", "torch", "zarr", "h5py", "safetensors", "tensorstore", "google-crc32c")
# the small net's decoder on slices of 256 x 256: the naive form holds whole maps of a step
DECODER = Case(
    SMALL.files,
    (
        "data.image_size=256",
        "decoder.fit.batch_size=4",
        "decoder.contrast.object_pixels=256",
        "decoder.contrast.background_pixels=384",
    ),
)


def main() -> None:
    """Measure the parts that were asked for, append their rows."""
    parts = {"sizes": _sizes, "read": _read, "decoder": _decoder}
    bench = Benchmark(__file__, __doc__, COLUMNS, PACKAGES)
    bench.option("--parts", choices=parts, nargs="+", default=list(parts))
    bench.numbers(
        rounds=(7, "of which the median counts; writing and the decoder have at most 3"),
        slices=(96, "of the readers' store"),
        levels=(1, "timesteps of a slice"),
        side=(64, "of a slice's map"),
        channels=(240, "of a slice"),
        slices_per_shard=(16, "of all stores"),
        steps=(20, "of the decoder, a round"),
        naive_steps=(1, "of the decoder with whole maps, a round"),
    )
    bench.shared_options("tiny", "folder")
    bench.parse()
    bench.begin()
    bench.run_parts(parts)


def _sizes(bench: Benchmark, folder: Path) -> None:
    """Bytes of the features alone, and of the store with its maps, seeds, keys and checksums."""
    count, store = bench.arguments.slices_per_shard, folder / "store"
    for case in [DEBUG] if bench.arguments.tiny else [SMALL, BRATS, GUIDED_DIFFUSION]:
        for storage in STORAGES:
            config = case.config(f"features.storage={storage}")
            shapes, taps = slice_shapes(meta_net(config), config), config.features.taps
            least = float(sum(2 * math.prod(shapes[tap][0]) for tap in taps))
            # its bytes do not depend on what is in it
            zeros = {
                name: np.zeros((count, *shape), kind) for name, (shape, kind) in shapes.items()
            }
            fill_store(store, count, shapes, lambda _, zeros=zeros: zeros, count)
            arrays = [name for tap in taps for name in (tap, tap + SCALE) if name in shapes]
            for name, folders in {
                f"{storage}, features alone": [store / name for name in arrays],
                f"{storage}, with maps, seeds, keys": [store],
            }.items():
                stored = folder_bytes(*folders) / count
                bench.add(
                    part="sizes",
                    config=case.name,
                    measure="stored bytes",
                    implementation=name,
                    slices=count,
                    ratio=stored / least,
                    bytes_per_slice=stored,
                    least_bytes=least,
                    mb_per_slice=stored / 1e6,
                    tb_per_100000_slices=stored * 1e5 / 1e12,
                )
            shutil.rmtree(store)


def _read(bench: Benchmark, folder: Path) -> None:
    given = bench.arguments
    sizes = Sizes(given.slices, given.levels, given.side, given.channels, given.slices_per_shard)
    shape = "x".join(map(str, sizes.shape))
    for columns in cache_reading.measure(folder, sizes, given.rounds):
        bench.add(part="read", config=shape, **columns)


def _decoder(bench: Benchmark, folder: Path) -> None:
    given, case = bench.arguments, DEBUG if bench.arguments.tiny else DECODER
    config, rounds = case.config(), min(given.rounds, 3)
    cache = write_store(config, folder / "store", num_slices=8)
    found = _measure_decoder(config, cache, given.steps, given.naive_steps, rounds)
    naive = next(row["cpu_ms"] for row in found if row["implementation"] == NAIVE)
    for row in found:
        bench.add(
            part="decoder",
            config=case.name,
            measure="optimizer step",
            pages="warm",
            slices=len(cache),
            rounds=rounds,
            ratio=row["cpu_ms"] / naive,
            **row,
        )


def _measure_decoder(
    config: Config, cache: FeatureCache, num_steps: int, num_naive_steps: int, rounds: int
) -> list[dict[str, Any]]:
    """The columns of each row, of all rounds together; times are an optimizer step's.

    Rounds alternate, after a step that is not counted. Raises RuntimeError where the two forms do
    not have the same loss.
    """
    trainings = {name: Training(config, cache, name) for name in (GATHERED, HARD, NAIVE)}
    losses = {name: training.step() for name, training in trainings.items()}
    if abs(losses[GATHERED] - losses[NAIVE]) > LOSS_TOLERANCE * abs(losses[NAIVE]):
        raise RuntimeError(f"the forms differ in their loss: {losses}")
    for index in range(len(cache)):  # verifies every chunk
        for name in cache.names:
            cache.read(name, index)
    for training in trainings.values():
        training.loading = 0.0

    counts = {name: num_naive_steps if name == NAIVE else num_steps for name in trainings}
    calls = {name: partial(training.steps, counts[name]) for name, training in trainings.items()}
    timed = {name: partial(cpu_and_wall, call) for name, call in calls.items()}
    rows = []
    for name, laps in alternate(timed, rounds).items():
        cpu, wall = (sum(column) / rounds / counts[name] for column in zip(*laps, strict=True))
        columns = {
            "implementation": name,
            "cpu_ms": 1000 * cpu,
            "wall_ms": 1000 * wall,
            "steps_per_second": 1 / wall,
            "loader_fraction": trainings[name].loading / (wall * rounds * counts[name]),
        }
        rows.append(columns)
    return rows


class Training:
    """Forward, backward and AdamW of the contrast task, from sample number 0 on."""

    def __init__(self, config: Config, cache: FeatureCache, name: str) -> None:
        fit = config.decoder.fit
        # random dropout and noise, off here, would make the losses of the two forms differ
        config = replace(config, decoder=replace(config.decoder, dropout=0.0, noise=0.0))
        self._cache, self._taps = cache, config.features.taps
        items = seed_pixels(config, cache, hard_negatives=0.5 if name == HARD else 0.0)
        stream = Stream(items, items.shard_of, config.seed)
        temperature = config.decoder.contrast.temperature
        net = decoder_net(config, cache)
        self._task = Contrast(net, temperature=temperature, seed=config.seed)
        self._optimizer = torch.optim.AdamW(self._task.parameters(), lr=fit.learning_rate)
        self._losses: Iterator[Tensor] = (
            self._naive(items, stream, fit.batch_size)
            if name == NAIVE
            else self._gathered(stream.batches(0, batch_size=fit.batch_size))
        )
        self.loading = 0.0  # seconds

    def step(self) -> float:
        """The loss of one optimizer step."""
        loss = next(self._losses)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def _gathered(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[Tensor]:
        while True:
            batch = self._loaded(lambda: next(batches))
            yield self._task(batch)["loss"]

    def _naive(self, items: SeedPixels, stream: Stream, batch_size: int) -> Iterator[Tensor]:
        """The same pixels, from maps upsampled, concatenated and embedded whole."""
        number = 0
        while True:
            embedded = []
            for _ in range(batch_size):
                for row, places, size in items.choose(stream.position(number), number):
                    maps = self._loaded(lambda row=row, size=size: self._upsampled(row, size))
                    embedded.append(self._task.net(maps)[places[:, 0], places[:, 1]])
                number += 1
            labels = torch.zeros(batch_size, sum(map(len, embedded)) // batch_size)
            labels[:, : items.numbers.num_object] = 1
            labels = labels.long().flatten()
            temperature = self._task.temperature
            yield supcon_loss(torch.cat(embedded), labels, temperature=temperature)

    def _upsampled(self, row: int, size: tuple[int, int]) -> Tensor:
        """(height, width, features) float32."""
        large = []
        for tap in self._taps:
            stored = torch.from_numpy(self._cache.read(tap, row).astype(np.float32))
            maps = stored.permute(0, 3, 1, 2)
            large.append(functional.interpolate(maps, size, mode="bilinear").flatten(0, 1))
        return torch.cat(large).movedim(0, -1)

    def _loaded(self, load: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        loaded = load()
        self.loading += time.perf_counter() - start
        return loaded


if __name__ == "__main__":
    main()
