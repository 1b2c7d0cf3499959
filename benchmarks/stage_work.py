"""The work of each stage as the stage does it, on made-up slices and with untrained nets.

Trainings are `fit` itself, with its optimizer, moving average and log, until the time is over;
slices come from memory, so that no loader is waited for, but the decoder's pixels are gathered by
real loader workers from a store whose pages are in memory. What is measured calls `Pace.tick`
before each unit of its work, until that raises `Enough`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from cases import Enough, Watched, make_task, num_channels, run_fit
from made_up import MadeUp, decoder_net, images_of, seed_pixels, write_slices, write_store
from measure import Call, peak_bytes, reset_peak
from torch import nn

from cldf_dist.config import Config, Fit
from cldf_dist.data.stream import Stream
from cldf_dist.inference.feature_extraction import compute_shard
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.loading import place
from cldf_dist.inference.patch_maps import PATCH_TAP, plus_taps
from cldf_dist.inference.seed_cam import FALLBACK, with_map
from cldf_dist.inference.segmenter import Segmenter
from cldf_dist.method.features import tap_shapes
from cldf_dist.methods import CLDF_PLUS
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.stages import train_decoder
from cldf_dist.system.distributed import accelerator
from cldf_dist.training.fit import Batch, Batches

WARMUP_STEPS = 3
ENDLESS = 10**9  # steps; the time is over before
SECTIONS = {  # of the configuration, by the trainings that read slices
    "train-diffusion": "diffusion",
    "tune-label-embedding": "label_tuning",
    "train-classifier": "classifier",
    "train-cam": "cam",
    "train-patch-classifier": "patch_classifier",
}


@dataclass(frozen=True)
class Plan:
    device: torch.device
    seconds: float  # of each measurement, after its warm-up
    rounds: int  # of which the median counts


@dataclass(frozen=True)
class Speed:
    """Of one unit of work, by the clock on the wall; the device's work is waited for."""

    seconds: float  # median of the rounds
    fastest: float
    slowest: float
    num_rounds: int
    peak_gb: float  # allocated on the GPU, or resident in memory


class Pace:
    """Notes the time at the ends of rounds. The first round is one unit; by it the length of the
    others is chosen."""

    def __init__(self, plan: Plan, warmup: int) -> None:
        self._plan = plan
        self._ticks, self._until = 0, warmup
        self._begun: float | None = None
        self._since, self._round_units = 0.0, 1
        self._seconds: list[float] = []
        reset_peak(plan.device)

    def tick(self) -> None:
        """A unit of work is about to begin; all before it are finished."""
        if self._ticks == self._until:
            self._end_round()
        self._ticks += 1

    def speed(self) -> Speed:
        seconds = self._seconds[1:] or self._seconds  # the first was the pilot
        return Speed(
            seconds=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            num_rounds=len(seconds),
            peak_gb=peak_bytes(self._plan.device) / 1e9,
        )

    def _end_round(self) -> None:
        if self._plan.device.type == "cuda":
            torch.cuda.synchronize(self._plan.device)
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
        else:
            self._seconds.append((now - self._since) / self._round_units)
        if len(self._seconds) == 1:
            per_round = self._plan.seconds / self._plan.rounds / self._seconds[0]
            self._round_units = max(1, round(per_round))
        late = self._seconds and now - self._begun >= self._plan.seconds
        if late or len(self._seconds) > self._plan.rounds:
            raise Enough
        self._since, self._until = now, self._ticks + self._round_units


def measure_call(call: Call, plan: Plan, warmup: int = 1) -> Speed:
    """The speed of a call."""
    pace = Pace(plan, warmup)
    with suppress(Enough):
        while True:
            pace.tick()
            call()
    return pace.speed()


@dataclass(frozen=True)
class Training:
    """A stage that is one call of `fit`."""

    stage: str
    settings: Fit
    make_task: Callable[[], nn.Module]
    stream: Batches

    def measure(self, config: Config, plan: Plan, num_micro_batches: int = 1) -> Speed:
        """One optimizer step of the whole batch."""
        settings = replace(
            self.settings, steps=ENDLESS, gradient_accumulation_steps=num_micro_batches
        )
        pace, numbers = Pace(plan, WARMUP_STEPS), count()

        @contextmanager
        def ticking(batch: Batch) -> Iterator[None]:
            if next(numbers) % num_micro_batches == 0:
                pace.tick()
            yield

        run_fit(config, self.stage, self.make_task(), Watched(self.stream, ticking), settings)
        return pace.speed()

    def measure_fitting(
        self, config: Config, plan: Plan, num_micro_batches: int = 1
    ) -> tuple[int, Speed]:
        """With the fewest micro-batches that the GPU's memory allows, and their number."""
        while True:
            with suppress(torch.OutOfMemoryError):
                return num_micro_batches, self.measure(config, plan, num_micro_batches)
            num_micro_batches *= 2
            if self.settings.batch_size % num_micro_batches:
                raise RuntimeError(f"{self.stage}: not even single slices fit this GPU")
            reset_peak(plan.device)


def trainings_of_slices(config: Config) -> list[Training]:
    """The trainings that read slices, of those that the configuration has."""
    return [
        Training(stage, settings.fit, partial(make_task, config, stage), MadeUp(config))
        for stage, settings in ((stage, getattr(config, name)) for stage, name in SECTIONS.items())
        if getattr(settings, "enabled", True)
    ]


def decoder_training(config: Config, folder: Path, num_slices: int, num_workers: int) -> Training:
    """The training of the pixel decoder, on a store of made-up features written to `folder`."""
    cache = write_store(config, folder / "features.zarr", num_slices)
    items = seed_pixels(config, cache, config.decoder.contrast.hard_negatives)
    return Training(
        "train-decoder",
        replace(config.decoder.fit, num_workers=num_workers),
        lambda: train_decoder._task(config, decoder_net(config, cache)),
        Stream(items, items.shard_of, config.seed),
    )


def cached_batch(config: Config, folder: Path) -> Callable[[], object]:
    """A call that computes one batch of the cache: slices read, maps, seeds and features made and
    brought to the host. Writing them, which the stage does meanwhile, is left out."""
    slices = write_slices(config, folder, config.cache.batch_size)
    nets = FrozenNets.untrained(config, num_channels(config))
    config = replace(config, cache=replace(config.cache, slices_per_shard=len(slices)))
    if config.seeds.cam == "auto":  # any map costs the same
        config = with_map(config, FALLBACK)
    return lambda: compute_shard(config, nets, slices, range(len(slices)))


def segmented_batch(config: Config, methods: tuple[str, ...] | None) -> Callable[[], object]:
    """A call that makes the score maps of one batch of slices, for these methods or all."""
    nets = FrozenNets.untrained(config, num_channels(config))
    prototypes = torch.eye(2, config.decoder.embedding, device=accelerator().device)
    taps = {"cldf": config.features.taps}
    if config.patch_classifier.enabled:
        taps[CLDF_PLUS] = plus_taps(config)
    decoders: Any = {
        method: (place(_decoder(config, nets.diffusion, of_method)), prototypes)
        for method, of_method in taps.items()
    }
    segmenter = Segmenter(config, nets, decoders)
    images = images_of(config, config.segment.batch_size)
    keys = [f"made_up_{number}" for number in range(len(images))]
    return lambda: segmenter.score("made_up", keys, images, methods)


def _decoder(config: Config, net: nn.Module, taps: tuple[str, ...]) -> PixelDecoder:
    found = tap_shapes(net, config.data.image_size, config.features, config.cam.channels)
    widths = {tap: shape[0] * shape[1] for tap, shape in found.items()}
    widths[PATCH_TAP] = config.patch_classifier.channels
    channels = {tap: widths[tap] for tap in taps}
    return PixelDecoder(channels, config.decoder.hidden, config.decoder.embedding)
