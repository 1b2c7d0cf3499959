"""The work of each stage as the stage does it, on made-up slices and with untrained nets.

Trainings are `fit` itself, with its optimizer, moving average and log, until the time is over;
slices come from memory, so that no loader is waited for, but the decoder's pixels are gathered by
real loader workers from a store whose pages are in memory.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_decoder import write_store
from stage_pace import Enough, Pace, Plan, Speed, measure, start_of_peak
from torch import nn
from train_setup import make_task

from cldf_dist.config import Config, Fit
from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import PixelsPerItem, SeedPixels, TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Slice
from cldf_dist.data.stream import Stream
from cldf_dist.inference.feature_extraction import Slices, cached_slices, compute_shard
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.loading import noise_schedule, place
from cldf_dist.inference.patch_maps import PATCH_TAP, plus_taps
from cldf_dist.inference.seed_cam import FALLBACK, with_map
from cldf_dist.inference.seed_sources import SeedLabels
from cldf_dist.inference.segmenter import Segmenter
from cldf_dist.method.features import tap_shapes
from cldf_dist.methods import CLDF_PLUS
from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.nets.patch_classifier import PatchClassifier
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.stages.tune_label_embedding import tell_apart
from cldf_dist.system.distributed import accelerator
from cldf_dist.tasks.classify import Classify, NoiseRange
from cldf_dist.tasks.contrast import Contrast
from cldf_dist.training.fit import Batch, Batches, fit

WARMUP_STEPS = 3
ENDLESS = 10**9  # steps; the time is over before


@dataclass(frozen=True)
class Training:
    """A stage that is one call of `fit`."""

    stage: str
    settings: Fit
    make_task: Callable[[], nn.Module]
    stream: Batches

    def measure(self, config: Config, plan: Plan, gradient_accumulation_steps: int = 1) -> Speed:
        """One optimizer step of the whole batch."""
        settings = replace(
            self.settings,
            steps=ENDLESS,
            gradient_accumulation_steps=gradient_accumulation_steps,
            checkpoint_every=0,
            validate_every=0,
            preview_every=0,
        )
        shutil.rmtree(config.run_folder / self.stage, ignore_errors=True)
        run = Run(config, self.stage, ())
        run.open()
        pace = Pace(plan, WARMUP_STEPS)
        try:
            with suppress(Enough):
                fit(
                    self.make_task(),
                    _Timed(self.stream, pace, gradient_accumulation_steps),
                    settings,
                    run,
                )
        finally:
            run.close()
        return pace.speed()

    def measure_fitting(
        self, config: Config, plan: Plan, gradient_accumulation_steps: int = 1
    ) -> tuple[int, Speed]:
        """With the fewest micro-batches that the GPU's memory allows, and their number."""
        speed = self._if_it_fits(config, plan, gradient_accumulation_steps)
        while speed is None:
            gradient_accumulation_steps *= 2
            if self.settings.batch_size % gradient_accumulation_steps:
                raise RuntimeError(f"{self.stage}: not even single slices fit this GPU")
            start_of_peak(plan.device)
            speed = self._if_it_fits(config, plan, gradient_accumulation_steps)
        return gradient_accumulation_steps, speed

    def _if_it_fits(
        self, config: Config, plan: Plan, gradient_accumulation_steps: int
    ) -> Speed | None:
        with suppress(torch.OutOfMemoryError):
            return self.measure(config, plan, gradient_accumulation_steps)
        return None


def trainings_of_slices(config: Config) -> tuple[Training, ...]:
    """The trainings that read slices."""
    stream = MadeUp(num_channels(config), config.data.image_size)
    labels, patches = config.label_tuning, config.patch_classifier
    trainings = [
        Training("train-diffusion", config.diffusion.fit, partial(make_task, config), stream),
        *(
            [Training("tune-label-embedding", labels.fit, partial(_labels, config), stream)]
            if labels.enabled
            else []
        ),
        Training("train-classifier", config.classifier.fit, partial(_classifier, config), stream),
        Training("train-cam", config.cam.fit, partial(_cam, config), stream),
    ]
    if patches.enabled:
        make = partial(_patch_classifier, config)
        trainings.append(Training("train-patch-classifier", patches.fit, make, stream))
    return tuple(trainings)


def decoder_training(config: Config, folder: Path, num_slices: int, num_workers: int) -> Training:
    """The training of the pixel decoder, on a store of made-up features written to `folder`."""
    cache = write_store(config, folder / "features.zarr", num_slices)
    settings = replace(config.decoder.fit, num_workers=num_workers)
    return Training(
        "train-decoder", settings, partial(_contrast, config, cache), _pixels(config, cache)
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


def segmented_batch(config: Config, rows: tuple[str, ...] | None) -> Callable[[], object]:
    """A call that makes the score maps of one batch of slices, for these rows or all."""
    nets = FrozenNets.untrained(config, num_channels(config))
    prototypes = torch.eye(2, config.decoder.embedding, device=accelerator().device)
    taps = {"cldf": config.features.taps}
    if config.patch_classifier.enabled:
        taps[CLDF_PLUS] = plus_taps(config)
    decoders: Any = {
        row: (place(_decoder(config, nets.diffusion, of_row)), prototypes)
        for row, of_row in taps.items()
    }
    segmenter = Segmenter(config, nets, decoders)
    images = _made_up_images(config, config.segment.batch_size)
    keys = [f"made_up_{number}" for number in range(len(images))]
    return lambda: segmenter.score("made_up", keys, images, rows)


def num_channels(config: Config) -> int:
    return len(datasets.channels(config.data))


def measure_batch(make: Callable[[], Callable[[], object]], plan: Plan) -> Speed:
    """One batch; its nets are made after those of earlier stages are gone."""
    start_of_peak(plan.device)
    return measure(make(), plan)


def _classifier(config: Config) -> Classify:
    settings = config.classifier
    noise = NoiseRange(noise_schedule(config), settings.max_timestep, settings.clean_fraction)
    net = NoisyClassifier(settings, num_channels(config))
    return Classify(net, label_smoothing=settings.label_smoothing, noise=noise, seed=config.seed)


def _cam(config: Config) -> Classify:
    net = CamClassifier(config.cam, num_channels(config))
    return Classify(net, label_smoothing=config.cam.label_smoothing, noise=None, seed=config.seed)


def _patch_classifier(config: Config) -> Classify:
    settings = config.patch_classifier
    net = PatchClassifier(settings, num_channels(config))
    return Classify(net, label_smoothing=settings.label_smoothing, noise=None, seed=config.seed)


def _contrast(config: Config, cache: FeatureCache) -> Contrast:
    shapes = {tap: cache.slice_shape(tap) for tap in config.features.taps}
    settings, contrast = config.decoder, config.decoder.contrast
    channels = {tap: shape[0] * shape[3] for tap, shape in shapes.items()}
    return Contrast(
        PixelDecoder(
            channels, settings.hidden, settings.embedding, settings.dropout, settings.noise
        ),
        temperature=contrast.temperature,
        seed=config.seed,
        backend=contrast.backend,
        precision=contrast.precision,
        deterministic=contrast.deterministic,
    )


def _labels(config: Config) -> nn.Module:
    diffusion = place(build_unet(config.diffusion.net, num_channels(config)))
    return tell_apart(config, diffusion)


def _decoder(config: Config, net: nn.Module, taps: tuple[str, ...]) -> PixelDecoder:
    found = tap_shapes(net, config.data.image_size, config.features, config.cam.channels)
    widths = {tap: shape[0] * shape[1] for tap, shape in found.items()}
    widths[PATCH_TAP] = config.patch_classifier.channels
    channels = {tap: widths[tap] for tap in taps}
    return PixelDecoder(channels, config.decoder.hidden, config.decoder.embedding)


def _pixels(config: Config, cache: FeatureCache) -> Stream:
    contrast, batch = config.decoder.contrast, config.decoder.fit.batch_size
    labels, rows = SeedLabels(cache), np.arange(len(cache))
    counts = count_labels(labels, rows)
    pixels = TrainingPixels(cache, config.features.taps, labels, rows, counts)
    numbers = PixelsPerItem(
        contrast.object_pixels // batch,
        contrast.background_pixels // batch,
        contrast.hard_negatives,
        contrast.hard_pool,
    )
    items = SeedPixels(pixels, numbers, config.seed)
    return Stream(items, items.shard_of, config.seed)


def _made_up_images(config: Config, count: int) -> Any:
    """(slices, channels, height, width) float32 in [-1, 1]."""
    side = config.data.image_size
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (count, num_channels(config), side, side)).astype(np.float32)


def write_slices(config: Config, folder: Path, count: int) -> Slices:
    """Made-up slices in shards on the disk, half with the object."""
    images = _made_up_images(config, count)
    slices = [
        Slice(f"made_up_{n:04d}", "made_up", n, n % 2, image, None)
        for n, image in enumerate(images)
    ]
    write_manifest(
        folder,
        settings={},
        channels=datasets.channels(config.data),
        splits={"train": ["made_up"], "validation": []},
        geometry={},
        shards=write_shards(folder, "train", slices, config.data.slices_per_shard),
    )
    return cached_slices(ShardSet(folder))


class MadeUp:
    """The same made-up slices again and again, in memory."""

    def __init__(self, num_channels: int, side: int) -> None:
        self._shape = (num_channels, side, side)

    def fingerprint(self) -> str:
        return "made up"

    def batches(
        self, consumed: int, *, batch_size: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[Batch]:
        share = batch_size // world_size
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(share, *self._shape, generator=generator) * 2 - 1
        if torch.cuda.is_available():
            images = images.pin_memory()  # as the loader's
        labels = torch.arange(share) % 2
        while True:
            numbers = torch.arange(consumed + rank, consumed + batch_size, world_size)
            yield {"image": images, "label": labels, "sample_number": numbers}
            consumed += batch_size

    def fixed(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[Batch]:
        raise AssertionError("validation is switched off")


class _Timed:
    """A stream that ticks before the first micro-batch of every step."""

    def __init__(self, stream: Batches, pace: Pace, gradient_accumulation_steps: int) -> None:
        self._stream, self._pace, self._accumulate = stream, pace, gradient_accumulation_steps
        self.fingerprint = stream.fingerprint
        self.fixed = stream.fixed

    def batches(self, consumed: int, **place: Any) -> Iterator[Batch]:
        batches = self._stream.batches(consumed, **place)
        try:
            for number, batch in enumerate(batches):
                if number % self._accumulate == 0:
                    self._pace.tick()
                yield batch
        finally:
            close = getattr(batches, "close", None)
            if close is not None:  # ends loader workers
                close()
