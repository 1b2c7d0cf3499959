"""The labelled pixels that train a decoder, the statistics of their features, and prototypes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import PixelLabels, count_labels
from cldf_dist.data.features.pixels import TrainingPixels, gather_pixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.labels import PixelLabel
from cldf_dist.method.prototypes import class_prototypes
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.system.distributed import accelerator, fail_on_all_ranks, gather_objects, processes
from cldf_dist.system.seeding import sample_seed

STATISTICS_SLICES = 256  # training slices for the mean and standard deviation of each feature
CONSTANT = 1e-4  # of a feature's mean: a smaller deviation is float16's rounding
PROTOTYPE_SLICES = 2048  # training slices of each class for the prototypes, at most


def feature_statistics(
    pixels: TrainingPixels, seed: int
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    """Mean and standard deviation of each feature over a sample of the training slices.

    The deviation of a constant feature is 0.
    """
    rng = np.random.default_rng(sample_seed(seed, 0, "feature statistics"))
    slice_indices = rng.permutation(pixels.slice_indices)[:STATISTICS_SLICES]
    means, spreads = [], []
    for tap in pixels.taps:
        count, total, squares = 0, np.zeros(num_channels(pixels.cache, tap)), 0.0
        for slice_index in slice_indices:
            stored = pixels.cache.read(tap, int(slice_index)).astype(np.float64)
            scale = pixels.cache.scale(tap, int(slice_index))
            if scale is not None:
                stored *= scale[:, None, None]
            flat = stored.transpose(1, 2, 0, 3).reshape(-1, total.size)
            count += len(flat)
            total = total + flat.sum(0)
            squares = squares + np.square(flat).sum(0)
        mean = total / count
        variance = squares / count - mean**2
        # a constant feature has no deviation: divided by its rounding it would be noise
        constant = variance <= np.square(CONSTANT * mean)
        means.append(mean)
        spreads.append(np.where(constant, 0, np.sqrt(np.maximum(variance, 0))))
    return (
        torch.from_numpy(np.concatenate(means)).float(),
        torch.from_numpy(np.concatenate(spreads)).float(),
    )


def prototypes_of(
    config: Config, net: PixelDecoder, pixels: TrainingPixels
) -> Float[Tensor, "prototypes embedding"]:
    """The `class_prototypes` of a random sample of the training seeds of each class."""
    rng = np.random.default_rng(sample_seed(config.seed, 0, "prototypes"))
    embeddings, labels = [], []
    for label in (PixelLabel.BACKGROUND, PixelLabel.OBJECT):
        slice_indices = pixels.slices_with(label)
        if len(slice_indices) > PROTOTYPE_SLICES:
            slice_indices = np.sort(rng.permutation(slice_indices)[:PROTOTYPE_SLICES])
        per_slice = -(-config.decoder.prototype_pixels // len(slice_indices))
        for slice_index in slice_indices:
            features = _features_of(pixels, int(slice_index), label, per_slice, rng)
            with torch.no_grad():
                embeddings.append(net(torch.from_numpy(features).to(accelerator().device)).cpu())
            labels.append(torch.full((len(features),), label))
    per_class = config.decoder.prototypes_per_class
    seed = sample_seed(config.seed, 0, "k-means")
    return class_prototypes(torch.cat(embeddings), torch.cat(labels), per_class, seed=seed)


def _features_of(
    pixels: TrainingPixels, slice_index: int, label: int, limit: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    labels = pixels.labels.labels(slice_index)
    height, width = labels.shape
    chosen = rng.permutation(np.flatnonzero(labels == label))[:limit]
    places = np.stack(np.divmod(chosen, width), axis=1)
    return gather_pixels(pixels.cache, pixels.taps, slice_index, places, (height, width))


def training_pixels(
    cache: FeatureCache, taps: tuple[str, ...], labels: PixelLabels, num_slices: int
) -> TrainingPixels:
    """The pixels of the first `num_slices` slices of the cache.

    Each process counts the labels of its part of them.
    """
    slice_indices, here = np.arange(num_slices), processes()
    parts = [slice(rank, None, here.world_size) for rank in range(here.world_size)]
    with fail_on_all_ranks():
        mine = count_labels(labels, slice_indices[parts[here.rank]])
    counts = np.zeros((num_slices, 2), np.int64)
    for part, found in zip(parts, gather_objects(mine), strict=True):
        counts[part] = found
    return TrainingPixels(cache, taps, labels, slice_indices, counts)


def num_channels(cache: FeatureCache, tap: str) -> int:
    """The number of features of a pixel in a tap of the store, over all its levels."""
    levels, _, _, channels = cache.slice_shape(tap)
    return levels * channels
