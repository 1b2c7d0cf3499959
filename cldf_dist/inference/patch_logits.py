"""The patch classifier's evidence: its maps, and the seeds of `cldf_plus` that are cut from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import PatchLogitLabels, PixelLabels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.method.seeds import SeedCount
from cldf_dist.method.threshold import negative_threshold
from cldf_dist.nets.patch_classifier import PatchClassifier

PATCH_TAP = "patch"  # the patch classifier's activations among the features of a pixel
PATCH_LOGITS = "patch_logits"  # its logits, in the cache
THRESHOLD_SLICES = 2048  # negative validation slices that the threshold is taken from, at most


@dataclass(frozen=True)
class PatchMaps:
    """What the patch classifier says about a batch of slices."""

    activations: Tensor  # (batch, 1, features, h, w), as the features of a tap
    patch_logits: Tensor  # (batch, height, width) logits; -inf outside the subject


@torch.no_grad()
def patch_maps(net: PatchClassifier, images: Tensor, inside: Tensor) -> PatchMaps:
    """Of slices (batch, channels, height, width); `inside` is True on their subjects."""
    activations = net.activations(images)
    patch_logits = net.patch_logits(activations, (images.shape[2], images.shape[3]))
    return PatchMaps(activations.float()[:, None], patch_logits.masked_fill(~inside, -torch.inf))


def plus_taps(config: Config) -> tuple[str, ...]:
    """The taps that `cldf_plus` learns from."""
    return (*config.features.taps, *([PATCH_TAP] if config.plus.patch_tap else []))


def patch_logit_labels(
    config: Config, cache: FeatureCache, train: SliceTable, validation: SliceTable
) -> PatchLogitLabels:
    """The seeds of `cldf_plus` in the training slices; the cache holds those, then the others.

    The threshold is the evidence that `plus.negative_fraction` of the subject's pixels of negative
    validation slices exceed: there all evidence is false, so that image-level labels alone set it,
    and the net has not learnt them. Raises ValueError where there is no such slice."""
    negative = len(train) + np.flatnonzero(validation.labels == 0)
    if not len(negative):
        raise ValueError(
            "cldf_plus takes its threshold from negative validation slices, and there is none; "
            "set patch_classifier.enabled=false"
        )
    spread = (
        np.linspace(0, len(negative) - 1, min(len(negative), THRESHOLD_SLICES)).round().astype(int)
    )
    found = [cache.read(PATCH_LOGITS, int(row)).astype(np.float32) for row in negative[spread]]
    scores = np.concatenate([patch_logits[np.isfinite(patch_logits)] for patch_logits in found])
    return PatchLogitLabels(
        cache, negative_threshold(scores, config.plus.negative_fraction), config.plus.cam_threshold
    )


def seed_report(labels: PixelLabels, table: SliceTable) -> dict[str, float | int | None]:
    """Precision and recall of the seeds of positive training slices, where masks are known.

    A diagnostic for the report: nothing of a run is trained or chosen by it.
    """
    count = SeedCount()
    for row in np.flatnonzero(table.labels == 1):
        mask = table.read_mask(int(row))
        if mask is not None:
            seeds = labels.labels(int(row)).copy()  # torch wants it writable
            count.add(torch.from_numpy(seeds), torch.from_numpy(mask))
    if not count.slices:
        return {}
    report = {k: None if np.isnan(value) else value for k, value in count.quality().items()}
    return {
        **report,
        "slices": count.slices,
        "object_seeds_per_slice": count.object_seeds / count.slices,
    }
