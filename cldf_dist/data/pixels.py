"""Seed pixels with their features: what the pixel decoder trains on.

Features are gathered at the sampled pixels only, four neighbours a tap, from maps at native
resolution; whole maps are never upsampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.data.cache import FeatureCache
from cldf_dist.seeding import sample_seed

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class SeedPixels:
    """Items of a stream: each is a positive slice and a negative partner, with a fixed number of
    object and background pixels, so that the numbers per step depend on no chance and no rank.

    `rows` are the cache rows that may be used (training slices); `seeds` (slices, height, width)
    holds 1 object, 0 background, -1 unknown for each cache row. `num_background` pixels come half
    from the positive slice, half from the negative one (all from one of them where the other has
    none; from another positive slice where there is no negative one).
    """

    def __init__(
        self,
        cache: FeatureCache,
        taps: Sequence[str],
        *,
        rows: IntArray,
        seeds: npt.NDArray[np.int8],
        num_foreground: int,
        num_background: int,
        seed: int,
    ) -> None:
        has_object = (seeds == 1).any(axis=(1, 2))
        has_background = (seeds == 0).any(axis=(1, 2))
        self.positive = np.array([row for row in rows if has_object[row]], dtype=np.int64)
        self.negative = np.array(
            [row for row in rows if has_background[row] and not has_object[row]], dtype=np.int64
        )
        if not len(self.positive):
            raise ValueError("no training slice has an object seed; lower seeds.foreground")
        self.with_background = np.array(
            [row for row in rows if has_background[row]], dtype=np.int64
        )
        if not len(self.with_background):
            raise ValueError("no training slice has a background seed; raise seeds.background")
        self.cache, self.taps, self.seeds, self.seed = cache, list(taps), seeds, seed
        self.num_foreground, self.num_background = num_foreground, num_background

    @property
    def shard_of(self) -> IntArray:
        """The cache shard of each item: the stream reads shard by shard."""
        return self.positive // self.cache.slices_per_shard

    def __len__(self) -> int:
        return len(self.positive)

    def get(self, position: int, sample_number: int) -> dict[str, Any]:
        """features (pixels, channels) float32, labels (pixels,) 1 or 0, sample_number."""
        rng = np.random.default_rng(sample_seed(self.seed, sample_number, "seed pixels"))
        row = int(self.positive[position])
        has_background = bool((self.seeds[row] == 0).any())
        if not len(self.negative) and has_background:
            partner, here = row, self.num_background
        else:
            partners = self.negative if len(self.negative) else self.with_background
            partner = int(rng.choice(partners))
            here = self.num_background // 2 if has_background else 0
        parts = [
            self._sample(row, 1, self.num_foreground, rng),
            self._sample(row, 0, here, rng),
            self._sample(partner, 0, self.num_background - here, rng),
        ]
        features = np.concatenate([part for part in parts if len(part)])
        labels = np.zeros(len(features), dtype=np.int64)
        labels[: self.num_foreground] = 1
        return {
            "features": torch.from_numpy(features),
            "labels": torch.from_numpy(labels),
            "sample_number": sample_number,
        }

    def _sample(self, row: int, label: int, count: int, rng: np.random.Generator) -> FloatArray:
        if count == 0:
            return np.zeros((0, 0), dtype=np.float32)
        height, width = self.seeds.shape[1:]
        candidates = np.flatnonzero(self.seeds[row] == label)
        chosen = rng.choice(candidates, count, replace=len(candidates) < count)
        pixels = np.stack(np.divmod(chosen, width), axis=1)
        return gather_pixels(self.cache, self.taps, row, pixels, (height, width))


def gather_pixels(
    cache: FeatureCache, taps: Sequence[str], row: int, pixels: IntArray, size: tuple[int, int]
) -> FloatArray:
    """Features (pixels, channels of all taps) of one slice at `pixels` (n, 2), rows and columns of
    an image of `size`: the same values as bilinear upsampling (half-pixel centres) and indexing."""
    return np.concatenate(
        [interpolate_at(cache.read(tap, row), pixels, size) for tap in taps], axis=1
    )


def interpolate_at(stored: npt.NDArray[Any], pixels: IntArray, size: tuple[int, int]) -> FloatArray:
    """Bilinear values (pixels, levels x channels) of maps (levels, h, w, channels)."""
    levels, height, width, channels = stored.shape
    low_y, high_y, weight_y = _neighbours(pixels[:, 0], size[0], height)
    low_x, high_x, weight_x = _neighbours(pixels[:, 1], size[1], width)
    weight_y, weight_x = weight_y[None, :, None], weight_x[None, :, None]
    top = _lerp(stored[:, low_y, low_x], stored[:, low_y, high_x], weight_x)
    bottom = _lerp(stored[:, high_y, low_x], stored[:, high_y, high_x], weight_x)
    values = _lerp(top, bottom, weight_y)  # (levels, pixels, channels)
    return values.transpose(1, 0, 2).reshape(len(pixels), levels * channels)


def _neighbours(at: IntArray, size: int, stored: int) -> tuple[IntArray, IntArray, FloatArray]:
    """The two stored positions around each image position, and the weight of the second."""
    place = np.clip((at + 0.5) * (stored / size) - 0.5, 0, stored - 1)
    low = np.floor(place).astype(np.int64)
    return low, np.minimum(low + 1, stored - 1), (place - low).astype(np.float32)


def _lerp(first: npt.NDArray[Any], second: npt.NDArray[Any], weight: FloatArray) -> FloatArray:
    first = first.astype(np.float32)
    result: FloatArray = first + (second.astype(np.float32) - first) * weight
    return result
