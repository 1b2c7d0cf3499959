"""Labelled pixels with their features, on which the pixel decoder is trained.

Features are gathered at the sampled pixels only, four neighbours a tap, from maps at native
resolution; whole maps are never upsampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.data.features.pixel_labels import Labels, PixelLabels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.labels import PixelLabel
from cldf_dist.maths.interpolation import linear_neighbours
from cldf_dist.system.seeding import sample_seed

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
ACTIVATIONS = ("cam", "gradient_map")  # cached maps that are high on the object


@dataclass(frozen=True)
class TrainingPixels:
    """The cache with a label for each pixel of the slices that may be used.

    `slice_indices` are those of these slices in the cache; `counts` (slices, 2) are their numbers
    of background and object pixels (`count_labels`).
    """

    cache: FeatureCache
    taps: tuple[str, ...]
    labels: PixelLabels
    slice_indices: IntArray
    counts: IntArray

    def slices_with(self, label: int) -> IntArray:
        """The indices of slices that have a pixel of that label."""
        return self.slice_indices[self.counts[:, label] > 0]


@dataclass(frozen=True)
class PixelsPerItem:
    """The number of pixels of each item of the stream, whatever its slices."""

    num_object: int
    num_background: int
    hard_negatives: float  # fraction of a slice's background pixels sampled from its hardest
    hard_pool: float  # fraction of a slice's background that counts as its hardest


class SeedPixels:
    """The items of a stream: pixels of a positive slice and of a negative partner.

    Each item has a fixed number of object and background pixels, so that the numbers per step
    depend neither on chance nor on the rank. The background pixels come half from the positive
    slice, half from the negative one (all from one of them where the other has none; from another
    positive slice where there is no negative one). An epoch holds every positive slice once. Raises
    ValueError where a class has no seed.
    """

    def __init__(self, pixels: TrainingPixels, numbers: PixelsPerItem, seed: int) -> None:
        self.positive = pixels.slices_with(PixelLabel.OBJECT)
        self.with_background = pixels.slices_with(PixelLabel.BACKGROUND)
        num_background, num_object = pixels.counts.T
        self.negative = pixels.slice_indices[(num_background > 0) & (num_object == 0)]
        if not len(self.positive):
            raise ValueError(
                "no training slice has an object seed; lower seeds.object_threshold (cldf_plus: "
                "raise plus.negative_fraction)"
            )
        if not len(self.with_background):
            raise ValueError(
                "no training slice has a background seed; raise seeds.background_threshold"
            )
        self.pixels, self.numbers, self.seed = pixels, numbers, seed

    @property
    def shard_of(self) -> IntArray:
        """The cache shard of each item: the stream reads shard by shard."""
        return self.positive // self.pixels.cache.slices_per_shard

    def __len__(self) -> int:
        return len(self.positive)

    def get(self, position: int, sample_number: int) -> dict[str, Any]:
        """The "features" float32 (pixels, features), "labels" (pixels,) and "sample_number"."""
        cache, taps = self.pixels.cache, self.pixels.taps
        parts = self.choose(position, sample_number)
        features = np.concatenate(
            [
                gather_pixels(cache, taps, slice_index, places, size)
                for slice_index, places, size in parts
            ]
        )
        labels = np.zeros(len(features), dtype=np.int64)
        labels[: self.numbers.num_object] = 1
        return {
            "features": torch.from_numpy(features),
            "labels": torch.from_numpy(labels),
            "sample_number": sample_number,
        }

    def choose(
        self, position: int, sample_number: int
    ) -> list[tuple[int, IntArray, tuple[int, int]]]:
        """The pixels of an item, a function of its sample number; object pixels first.

        For each slice: its index in the cache, rows and columns (pixels, 2) of the pixels, and the
        size of its image.
        """
        rng = np.random.default_rng(sample_seed(self.seed, sample_number, "seed pixels"))
        num_background = self.numbers.num_background
        slice_index = int(self.positive[position])
        labels = self.pixels.labels.labels(slice_index)
        has_background = bool((labels == PixelLabel.BACKGROUND).any())
        if not len(self.negative) and has_background:
            partner, here = slice_index, num_background
        else:
            partners = self.negative if len(self.negative) else self.with_background
            partner = int(rng.choice(partners))
            here = num_background // 2 if has_background else 0
        objects = _draw(np.flatnonzero(labels == PixelLabel.OBJECT), self.numbers.num_object, rng)
        chosen = np.concatenate([objects, self._background(slice_index, labels, here, rng)])
        parts = [(slice_index, _places(chosen, labels), _size(labels))]
        if there := num_background - here:
            labels = self.pixels.labels.labels(partner)
            chosen = self._background(partner, labels, there, rng)
            parts.append((partner, _places(chosen, labels), _size(labels)))
        return parts

    def _background(
        self, slice_index: int, labels: Labels, count: int, rng: np.random.Generator
    ) -> IntArray:
        """Flat positions of `count` background pixels, the hard ones first."""
        if not count:
            return np.zeros(0, np.int64)
        candidates = np.flatnonzero(labels == PixelLabel.BACKGROUND)
        num_hard = round(self.numbers.hard_negatives * count)
        if not num_hard:
            return _draw(candidates, count, rng)
        activation = strongest_activation(self.pixels.cache, slice_index, labels)
        pool = candidates[_highest(activation.reshape(-1)[candidates], self.numbers.hard_pool)]
        hard = _draw(pool, num_hard, rng)
        is_left = labels.reshape(-1) == PixelLabel.BACKGROUND
        is_left[hard] = False
        left = np.flatnonzero(is_left) if is_left.any() else candidates
        return np.concatenate([hard, _draw(left, count - num_hard, rng)])


def strongest_activation(cache: FeatureCache, slice_index: int, labels: Labels) -> FloatArray:
    """The larger of a slice's activation and gradient map, (height, width) in [0, 1].

    Each is scaled to [0, 1] over the labelled pixels of the slice, as the maps of the seeds are
    scaled over its body.
    """
    known = np.flatnonzero(labels >= 0)
    strongest = np.zeros(len(known), np.float32)
    for name in ACTIVATIONS:
        values = _float32(cache.read(name, slice_index).reshape(-1)[known])
        low, high = values.min(), values.max()
        if high > low:  # a constant map says nothing
            np.maximum(strongest, (values - low) / (high - low), out=strongest)
    result = np.zeros(labels.shape, np.float32)
    result.reshape(-1)[known] = strongest
    return result


def gather_pixels(
    cache: FeatureCache,
    taps: Sequence[str],
    slice_index: int,
    pixels: IntArray,
    size: tuple[int, int],
) -> FloatArray:
    """Features (pixels, channels of all taps) of one slice at some of its pixels.

    `pixels` (pixels, 2) are rows and columns of an image of `size`. The values are those of
    bilinear upsampling (half-pixel centres) and indexing.
    """
    parts = []
    for tap in taps:
        values = interpolate_at(cache.read(tap, slice_index), pixels, size)
        scale = cache.scale(tap, slice_index)
        parts.append(values if scale is None else values * scale.reshape(-1))
    return np.concatenate(parts, axis=1)


def interpolate_at(stored: npt.NDArray[Any], pixels: IntArray, size: tuple[int, int]) -> FloatArray:
    """Bilinear values (pixels, levels x channels) of maps (levels, height, width, channels)."""
    levels, height, width, channels = stored.shape
    low_y, high_y, weight_y = linear_neighbours(pixels[:, 0], target=size[0], source=height)
    low_x, high_x, weight_x = linear_neighbours(pixels[:, 1], target=size[1], source=width)
    rows = np.stack([low_y, high_y])[:, None]
    places = rows * width + np.stack([low_x, high_x])  # (below, beside, pixels)
    corners = np.take(stored.reshape(levels, height * width, channels), places, axis=1)
    values = _float32(corners)  # (levels, below, beside, pixels, channels)
    beside = _lerp(values[:, :, 0], values[:, :, 1], weight_x[:, None])
    result = _lerp(beside[:, 0], beside[:, 1], weight_y[:, None])  # (levels, pixels, channels)
    return result.transpose(1, 0, 2).reshape(len(pixels), levels * channels)


def _float32(values: npt.NDArray[Any]) -> FloatArray:
    """The values as float32, bit-identical to numpy's conversion in a tenth of its time.

    float32 is not copied.
    """
    converted: FloatArray = torch.from_numpy(values).float().numpy()
    return converted


def _lerp(first: FloatArray, second: FloatArray, weight: FloatArray) -> FloatArray:
    """The values first + (second - first) * weight, computed in the memory of `second`."""
    second -= first
    second *= weight
    second += first
    return second


def _draw(candidates: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """A random choice of `count` candidates; without repetition where there are enough."""
    chosen: IntArray = rng.choice(candidates, count, replace=len(candidates) < count)
    return chosen


def _highest(values: FloatArray, fraction: float) -> npt.NDArray[np.bool_]:
    """True for the highest `fraction` of the values, at least one.

    All values that equal the lowest of them count too, so that the order of pixels decides no tie.
    """
    count = max(1, round(fraction * len(values)))
    lowest = np.partition(values, len(values) - count)[len(values) - count]
    return np.asarray(values >= lowest)


def _places(chosen: IntArray, labels: Labels) -> IntArray:
    """Flat positions as (pixels, 2): row and column."""
    return np.stack(np.divmod(chosen, labels.shape[1]), axis=1)


def _size(labels: Labels) -> tuple[int, int]:
    return labels.shape[0], labels.shape[1]
