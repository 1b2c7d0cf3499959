"""Where to cut a score map: without masks, by its histogram, and (for reference) with masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from skimage.filters import threshold_otsu

Scores = npt.NDArray[np.floating]


def negative_cut(scores: Scores, fraction: float) -> float:
    """The lowest score with at most `fraction` of `scores` strictly above it.

    `scores` are those of all subject pixels of negative validation slices: the cut is set without
    masks, by the share of false alarms it allows where there is nothing to find.
    """
    _check(scores)
    if not 0 <= fraction < 1:
        raise ValueError(f"segment.negative_fraction must be in [0, 1), got {fraction}")
    position = len(scores) - 1 - math.floor(fraction * len(scores))
    return float(np.partition(scores, position)[position])


def otsu_cut(scores: Scores) -> float:
    """Otsu's threshold; of constant scores, that constant."""
    _check(scores)
    low = float(scores.min())
    return low if low == float(scores.max()) else float(threshold_otsu(scores))


def oracle_cut(
    scores: Sequence[Scores], truth: Sequence[npt.NDArray[np.bool_]], num_cuts: int = 200
) -> tuple[float, float]:
    """(cut, mean Dice over patients) of the best cut: it uses masks, so for reference rows only.

    One 1-D array per patient in each list. The cuts tried are quantiles of all scores, denser
    towards the top. A patient without object counts 0 where anything exceeds the cut and not at
    all elsewhere, as in `metrics`.
    """
    pooled = np.concatenate(list(scores))
    _check(pooled)
    # quantiles 1 - s with s falling evenly on a logarithmic scale to a single pixel
    shares = np.geomspace(1.0, 1.0 / len(pooled), num_cuts)
    cuts = np.unique(np.quantile(pooled, 1 - shares))
    dice = np.array([_dice_at(s, t, cuts) for s, t in zip(scores, truth, strict=True)])
    num_counting = np.maximum((~np.isnan(dice)).sum(0), 1)
    means = np.nan_to_num(dice).sum(0) / num_counting
    best = int(np.argmax(means))
    return float(cuts[best]), float(means[best])


def _dice_at(scores: Scores, truth: npt.NDArray[np.bool_], cuts: Scores) -> npt.NDArray[np.float64]:
    """Dice of `scores > cut` for each cut; NaN where prediction and truth are both empty."""
    order = np.argsort(scores, kind="stable")
    num_below = np.searchsorted(scores[order], cuts, side="right")
    hits = np.concatenate([np.cumsum(truth[order][::-1])[::-1], [0]])[num_below]
    predicted = len(scores) - num_below
    total = predicted + int(truth.sum())
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


def _check(scores: Scores) -> None:
    if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(
            f"a cut needs a non-empty 1-D array of finite scores, got shape {scores.shape}"
        )
