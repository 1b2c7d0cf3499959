"""A label for each pixel of a training slice, read where it is needed and never held for all.

100,000 slices of 240 x 240 are 5.8 GB of labels, for every process and each of its workers; what
is kept of a slice is how many of its pixels bear which label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.data.slices import body_mask

BACKGROUND, OBJECT, UNKNOWN = 0, 1, -1

Labels = npt.NDArray[np.int8]
Numbers = npt.NDArray[np.int64]


class PixelLabels(Protocol):
    """Where labels come from. It travels to the loader's processes by pickle."""

    def labels(self, row: int) -> Labels:
        """(height, width) of the slice in that row of the cache: 1 object, 0 background, -1
        unknown. Read-only."""
        ...


@dataclass(frozen=True)
class SeedLabels:
    """The seeds of the cache, where they lie: no copy."""

    cache: FeatureCache

    def labels(self, row: int) -> Labels:
        return self.cache.read("seeds", row)


@dataclass(frozen=True)
class PatchLogitLabels:
    """Seeds where the patch classifier's evidence and the activation map agree: object above both
    thresholds in positive slices, background in all of the subject of negative ones; whatever else
    is in a positive slice is unknown."""

    cache: FeatureCache
    threshold: float  # logit
    cam_threshold: float  # of the map scaled to [0, 1] within the subject; 0: it is not asked

    def labels(self, row: int) -> Labels:
        patch_logits = self.cache.read("patch_logits", row)
        inside = np.isfinite(patch_logits)
        seeds = np.full(patch_logits.shape, UNKNOWN, np.int8)
        label = int(self.cache.read("label", row))
        if label == 1:
            seeds[(patch_logits > self.threshold) & self._in_cam(row, inside)] = OBJECT
        elif label == 0:
            seeds[inside] = BACKGROUND
        return seeds

    def _in_cam(self, row: int, inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if self.cam_threshold == 0:
            return inside
        cam = self.cache.read("cam", row).astype(np.float32)
        low, high = cam[inside].min(initial=np.inf), cam[inside].max(initial=-np.inf)
        return np.asarray(inside & (cam - low > self.cam_threshold * (high - low)))


@dataclass(frozen=True)
class MaskLabels:
    """True masks of the training slices, for the reference row alone: CLDF never trains on them.

    Unknown outside the subject, and everywhere in a slice without a mask. The first rows of the
    cache are those of `table`.
    """

    table: SliceTable

    def labels(self, row: int) -> Labels:
        mask = self.table.read_mask(row)
        inside = body_mask(self.table.read_image(row))
        if mask is None:
            return np.full(inside.shape, UNKNOWN, np.int8)
        return np.where(inside, mask, UNKNOWN).astype(np.int8)


def count_labels(source: PixelLabels, rows: Numbers) -> Numbers:
    """How many pixels of each row are background and object, (len(rows), 2); one at a time."""
    counts = np.zeros((len(rows), 2), np.int64)
    for place, row in enumerate(rows):
        labels = source.labels(int(row))
        for label in (BACKGROUND, OBJECT):
            counts[place, label] = np.count_nonzero(labels == label)
    return counts
