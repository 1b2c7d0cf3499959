"""Made-up data in the shape of a configuration: slices, in memory and in shards, and features."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import meta_net, num_channels

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import ACTIVATIONS, PixelsPerItem, SeedPixels, TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Slice
from cldf_dist.inference.feature_extraction import Slices, cached_slices
from cldf_dist.inference.seed_sources import SeedLabels
from cldf_dist.method.features import tap_shapes
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.training.fit import Batch
from cldf_dist.training.prefetch import to_device

SLICES_PER_SHARD = 4  # of a feature store
Shapes = dict[str, tuple[tuple[int, ...], str]]  # of a slice, and the type, by array


class MadeUp:
    """A stream of the same slices again and again, in memory."""

    def __init__(self, config: Config) -> None:
        side = config.data.image_size
        self._shape = (num_channels(config), side, side)

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


def batches_on(device: torch.device, config: Config, count: int) -> list[Batch]:
    """Batches of the diffusion model's training, brought to the device."""
    stream = MadeUp(config).batches(
        0, batch_size=config.diffusion.fit.batch_size, rank=0, world_size=1, num_workers=0
    )
    return [to_device(batch, device) for batch in islice(stream, count)]


def images_of(config: Config, count: int) -> Any:
    """(slices, channels, height, width) float32 in [-1, 1]."""
    side = config.data.image_size
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (count, num_channels(config), side, side)).astype(np.float32)


def write_slices(config: Config, folder: Path, count: int) -> Slices:
    """Slices of the configuration in shards on the disk."""
    channels = datasets.channels(config.data)
    write_tars(folder, images_of(config, count), channels, config.data.slices_per_shard)
    return cached_slices(ShardSet(folder))


def write_tars(
    folder: Path, images: Iterable[Any], channels: Sequence[str], slices_per_shard: int
) -> None:
    """Shards of a training patient, half of whose slices have the object."""
    slices = (
        Slice(f"made_up_{n:06d}", "made_up", n, n % 2, image, None)
        for n, image in enumerate(images)
    )
    write_manifest(
        folder,
        settings={},
        channels=list(channels),
        splits={"train": ["made_up"], "validation": []},
        geometry={},
        shards=write_shards(folder, "train", slices, slices_per_shard),
    )


def write_store(config: Config, folder: Path, num_slices: int) -> FeatureCache:
    """Features, maps and seeds; every second slice has no object seed."""
    side = config.data.image_size
    found = tap_shapes(meta_net(config), side, config.features, config.cam.channels)
    shapes: Shapes = {
        tap: ((levels, height, width, channels), "float16")
        for tap, (levels, channels, height, width) in found.items()
    }
    shapes |= dict.fromkeys(ACTIVATIONS, ((side, side), "float16"))
    shapes["seeds"] = ((side, side), "int8")
    rng = np.random.default_rng(0)

    def values(indices: range) -> dict[str, Any]:
        made: dict[str, Any] = {
            name: rng.standard_normal((len(indices), *shape), np.float32)
            for name, (shape, _) in shapes.items()
        }
        seeds = rng.integers(-1, 2, (len(indices), side, side))
        negative = np.array(indices) % 2 == 1
        seeds[negative] = np.minimum(seeds[negative], 0)
        return {**made, "seeds": seeds}

    return fill_store(folder, num_slices, shapes, values, SLICES_PER_SHARD)


def fill_store(
    folder: Path,
    num_slices: int,
    shapes: Shapes,
    values: Callable[[range], Mapping[str, Any]],
    slices_per_shard: int,
) -> FeatureCache:
    """A feature store whose shards hold the values of their slices."""
    cache = FeatureCache.create(
        folder, num_slices, shapes, slices_per_shard=slices_per_shard, attributes={}
    )
    for shard in range(cache.num_shards):
        indices = cache.slices_of(shard)
        cache.write_shard(shard, [f"slice_{index}" for index in indices], values(indices))
    return cache


def seed_pixels(config: Config, cache: FeatureCache, hard_negatives: float) -> SeedPixels:
    """What the decoder's training draws from the store."""
    contrast, batch = config.decoder.contrast, config.decoder.fit.batch_size
    labels, rows = SeedLabels(cache), np.arange(len(cache))
    counts = count_labels(labels, rows)
    pixels = TrainingPixels(cache, config.features.taps, labels, rows, counts)
    numbers = PixelsPerItem(
        contrast.object_pixels // batch,
        contrast.background_pixels // batch,
        hard_negatives,
        contrast.hard_pool,
    )
    return SeedPixels(pixels, numbers, config.seed)


def decoder_net(config: Config, cache: FeatureCache) -> PixelDecoder:
    """The decoder for the features of the store, as its training makes it."""
    torch.manual_seed(config.seed)
    shapes = {tap: cache.slice_shape(tap) for tap in config.features.taps}
    channels = {tap: shape[0] * shape[3] for tap, shape in shapes.items()}
    settings = config.decoder
    return PixelDecoder(
        channels, settings.hidden, settings.embedding, settings.dropout, settings.noise
    )
