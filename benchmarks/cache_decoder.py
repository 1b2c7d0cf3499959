"""Steps of the decoder's training: pixels gathered in the loader against whole maps upsampled."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_setup
from cldf_kernels import supcon_loss
from torch import Tensor
from torch.nn import functional

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import ACTIVATIONS, PixelsPerItem, SeedPixels, TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.stream import Stream
from cldf_dist.inference.seed_sources import SeedLabels
from cldf_dist.method.features import tap_shapes
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.tasks.contrast import Contrast

GATHERED, NAIVE = "pixels gathered in the loader", "naive full maps"
HARD = "pixels gathered in the loader, half of the background hard"
IMPLEMENTATIONS = (GATHERED, HARD, NAIVE)
SLICES_PER_SHARD = 4
LOSS_TOLERANCE = 1e-4  # relative, of one form to the other


@dataclass(frozen=True)
class Speed:
    """Of all rounds together."""

    steps_per_second: float
    cpu_ms: float  # a step
    wall_ms: float
    loader_fraction: float  # of the wall time; naive: of the whole maps
    first_loss: float


@dataclass
class Clock:
    wall: float = 0.0
    cpu: float = 0.0
    loading: float = 0.0
    steps: int = 0


def write_store(config: Config, folder: Path, num_slices: int) -> FeatureCache:
    """Made-up features, maps and seeds in the sizes of the configuration; half are positive."""
    side = config.data.image_size
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    found = tap_shapes(train_setup.meta_net(config), side, config.features, config.cam.channels)
    for tap, (levels, channels, height, width) in found.items():
        shapes[tap] = ((levels, height, width, channels), "float16")
    shapes |= dict.fromkeys(ACTIVATIONS, ((side, side), "float16"))
    shapes["seeds"] = ((side, side), "int8")
    cache = FeatureCache.create(
        folder, num_slices, shapes, slices_per_shard=SLICES_PER_SHARD, attributes={}
    )
    rng = np.random.default_rng(0)
    for shard in range(cache.num_shards):
        rows = cache.slices_of(shard)
        values: dict[str, Any] = {
            name: rng.standard_normal((len(rows), *shape), np.float32)
            for name, (shape, _) in shapes.items()
        }
        values["seeds"] = rng.integers(-1, 2, (len(rows), side, side))
        for place, row in enumerate(rows):
            if row % 2:
                values["seeds"][place] = np.minimum(values["seeds"][place], 0)
        cache.write_shard(shard, [f"slice_{row}" for row in rows], values)
    return cache


def measure(
    config: Config, cache: FeatureCache, steps: int, naive_steps: int, rounds: int
) -> dict[str, Speed]:
    """Optimizer steps of each implementation, in alternating rounds, after one that is not counted.

    Raises RuntimeError where the two forms do not have the same loss.
    """
    trainings = {name: _Training(config, cache, name) for name in IMPLEMENTATIONS}
    first = {name: training.step() for name, training in trainings.items()}
    if abs(first[GATHERED] - first[NAIVE]) > LOSS_TOLERANCE * abs(first[NAIVE]):
        raise RuntimeError(f"the forms differ in their loss: {first}")
    for training in trainings.values():
        training.touch()
        training.clock = Clock()
    for _ in range(rounds):
        for name, training in trainings.items():
            for _ in range(naive_steps if name == NAIVE else steps):
                training.step()
    return {name: _speed(training.clock, first[name]) for name, training in trainings.items()}


class _Training:
    """Forward, backward and AdamW of the contrast task, from sample number 0 on."""

    def __init__(self, config: Config, cache: FeatureCache, name: str) -> None:
        settings = config.decoder
        contrast, batch = settings.contrast, settings.fit.batch_size
        labels, rows = SeedLabels(cache), np.arange(len(cache))
        self.pixels = TrainingPixels(
            cache, config.features.taps, labels, rows, count_labels(labels, rows)
        )
        numbers = PixelsPerItem(
            contrast.object_pixels // batch,
            contrast.background_pixels // batch,
            0.5 if name == HARD else 0.0,
            contrast.hard_pool,
        )
        items = SeedPixels(self.pixels, numbers, config.seed)
        stream = Stream(items, items.shard_of, config.seed)
        channels = {tap: cache.slice_shape(tap) for tap in config.features.taps}
        torch.manual_seed(config.seed)
        net = PixelDecoder(
            {tap: shape[0] * shape[3] for tap, shape in channels.items()},
            settings.hidden,
            settings.embedding,
        )
        self.task = Contrast(net, temperature=contrast.temperature, seed=config.seed)
        self._optimizer = torch.optim.AdamW(self.task.parameters(), lr=settings.fit.learning_rate)
        self._losses: Iterator[Tensor] = (
            self._naive(items, stream, batch)
            if name == NAIVE
            else self._gathered(stream.batches(0, batch_size=batch))
        )
        self.clock = Clock()

    def step(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = next(self._losses)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self.clock.wall += time.perf_counter() - wall
        self.clock.cpu += time.process_time() - cpu
        self.clock.steps += 1
        return value

    def touch(self) -> None:
        """Verify every chunk of the store."""
        for row in self.pixels.slice_indices:
            for name in self.pixels.cache.names:
                self.pixels.cache.read(name, int(row))

    def _gathered(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[Tensor]:
        while True:
            batch = self._loaded(lambda: next(batches))
            yield self.task(batch)["loss"]

    def _naive(self, items: SeedPixels, stream: Stream, batch_size: int) -> Iterator[Tensor]:
        """The same pixels, from maps upsampled, concatenated and embedded whole."""
        number = 0
        while True:
            embedded = []
            for _ in range(batch_size):
                for row, places, size in items.choose(stream.position(number), number):
                    maps = self._loaded(lambda row=row, size=size: self._upsampled(row, size))
                    embedded.append(self.task.net(maps)[places[:, 0], places[:, 1]])
                number += 1
            labels = torch.zeros(batch_size, sum(map(len, embedded)) // batch_size)
            labels[:, : items.numbers.num_object] = 1
            yield supcon_loss(
                torch.cat(embedded),
                labels.long().flatten(),
                temperature=self.task.temperature,
            )

    def _upsampled(self, row: int, size: tuple[int, int]) -> Tensor:
        """(height, width, features) float32."""
        large = []
        for tap in self.pixels.taps:
            stored = torch.from_numpy(self.pixels.cache.read(tap, row).astype(np.float32))
            maps = stored.permute(0, 3, 1, 2)
            large.append(functional.interpolate(maps, size, mode="bilinear").flatten(0, 1))
        return torch.cat(large).movedim(0, -1)

    def _loaded(self, load: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        loaded = load()
        self.clock.loading += time.perf_counter() - start
        return loaded


def _speed(clock: Clock, first_loss: float) -> Speed:
    return Speed(
        steps_per_second=clock.steps / clock.wall,
        cpu_ms=1000 * clock.cpu / clock.steps,
        wall_ms=1000 * clock.wall / clock.steps,
        loader_fraction=clock.loading / clock.wall,
        first_loss=first_loss,
    )
