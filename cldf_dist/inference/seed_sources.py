"""The sources of training pixels' labels: the seeds of each method, or true masks.

The rules are in `method/seeds.py`. Sources read one slice at a time, and can be pickled to the
loader's processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import Labels, PixelLabels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.patch_maps import PATCH_LOGITS
from cldf_dist.labels import PixelLabel, SliceLabel
from cldf_dist.method.seeds import SeedCount, patch_seed_labels
from cldf_dist.method.threshold import negative_threshold

THRESHOLD_SLICES = 2048  # negative validation slices that set the threshold, at most


@dataclass(frozen=True)
class SeedLabels:
    """The seeds of `cldf`, read from the feature store without a copy."""

    cache: FeatureCache

    def labels(self, slice_index: int) -> Labels:
        """The seeds of one slice of the store."""
        return self.cache.read("seeds", slice_index)


@dataclass(frozen=True)
class PatchLogitLabels:
    """The seeds of `cldf_plus`, from stored patch logits and activation maps."""

    cache: FeatureCache
    threshold: float  # logit
    cam_threshold: float  # of the map scaled to [0, 1] within the body; 0: it is not used

    def labels(self, slice_index: int) -> Labels:
        """The seeds of one slice of the store."""
        logits, cam = (
            torch.from_numpy(self.cache.read(name, slice_index).astype(np.float32))
            for name in (PATCH_LOGITS, "cam")
        )
        seeds = patch_seed_labels(
            logits,
            cam,
            int(self.cache.read("label", slice_index)),
            object_threshold=self.threshold,
            cam_threshold=self.cam_threshold,
        )
        labels: Labels = seeds.numpy()
        return labels


@dataclass(frozen=True)
class MaskLabels:
    """True masks of the training slices, for the upper bounds alone: CLDF never trains on them.

    Pixels are unknown outside the body, and everywhere in a slice without a mask. The first slices
    of the store are those of `table`.
    """

    table: SliceTable

    def labels(self, slice_index: int) -> Labels:
        """The mask of one slice as pixel labels."""
        mask = self.table.read_mask(slice_index)
        inside = body_mask(self.table.read_image(slice_index))
        if mask is None:
            return np.full(inside.shape, PixelLabel.UNKNOWN, np.int8)
        return np.where(inside, mask, PixelLabel.UNKNOWN).astype(np.int8)


def patch_logit_labels(
    config: Config, cache: FeatureCache, train: SliceTable, validation: SliceTable
) -> PatchLogitLabels:
    """The seeds of `cldf_plus` in the training slices.

    The cache holds the slices of `train`, then those of `validation`. The threshold is the patch
    logit that a fraction `plus.negative_fraction` of the body pixels of negative validation slices
    exceed. There every object pixel is a false positive, so that image-level labels alone set it,
    and the net was not trained on them. Raises ValueError where there is no such slice.
    """
    negative = len(train) + np.flatnonzero(validation.labels == SliceLabel.NEGATIVE)
    if not len(negative):
        raise ValueError(
            "cldf_plus sets its threshold on negative validation slices, and there is none; "
            "set patch_classifier.enabled=false"
        )
    spread = (
        np.linspace(0, len(negative) - 1, min(len(negative), THRESHOLD_SLICES)).round().astype(int)
    )
    found = [
        cache.read(PATCH_LOGITS, int(slice_index)).astype(np.float32)
        for slice_index in negative[spread]
    ]
    scores = np.concatenate([patch_logits[np.isfinite(patch_logits)] for patch_logits in found])
    return PatchLogitLabels(
        cache, negative_threshold(scores, config.plus.negative_fraction), config.plus.cam_threshold
    )


def seed_report(labels: PixelLabels, table: SliceTable) -> dict[str, float | int | None]:
    """Precision and recall of the seeds of positive training slices, where masks are known.

    A diagnostic for the report: nothing of a run is trained or chosen by it.
    """
    count = SeedCount()
    for slice_index in np.flatnonzero(table.labels == SliceLabel.POSITIVE):
        mask = table.read_mask(int(slice_index))
        if mask is not None:
            seeds = labels.labels(int(slice_index)).copy()  # torch wants it writable
            count.add(torch.from_numpy(seeds), torch.from_numpy(mask))
    if not count.slices:
        return {}
    report = {k: None if np.isnan(value) else value for k, value in count.quality().items()}
    return {
        **report,
        "slices": count.slices,
        "object_seeds_per_slice": count.object_seeds / count.slices,
    }
