"""Thresholds of a score map: without masks, by its histogram, and (for reference) with masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from skimage.filters import threshold_otsu

Scores = npt.NDArray[np.floating]

NUM_THRESHOLDS = 256  # tried by the oracle


def negative_threshold(scores: Scores, fraction: float) -> float:
    """The lowest score with at most `fraction` of `scores` strictly above it.

    `scores` are those of all subject pixels of negative validation slices. So the threshold is set
    without masks, by the fraction of false alarms that it allows where there is no object."""
    _check(scores)
    if not 0 <= fraction < 1:
        raise ValueError(f"segment.negative_fraction must be in [0, 1), got {fraction}")
    position = len(scores) - 1 - math.floor(fraction * len(scores))
    return float(np.partition(scores, position)[position])


def otsu_threshold(scores: Scores) -> float:
    """Otsu's threshold; of constant scores, that constant."""
    _check(scores)
    low = float(scores.min())
    return low if low == float(scores.max()) else float(threshold_otsu(scores))


class OracleSearch:
    """Mean Dice of many thresholds at once; memory does not grow with the number of patients.

    It uses the test masks, so it is an upper bound of a score map, not a result of a method. True
    negatives are left out of the mean, as in the table; small components are not removed.
    """

    def __init__(self, thresholds: Scores) -> None:
        self.thresholds = thresholds  # ascending
        self._dice_sum = np.zeros(len(thresholds))
        self._num_defined = np.zeros(len(thresholds), dtype=np.int64)

    def add(self, scores: Scores, truth: npt.NDArray[np.bool_], num_true: int) -> None:
        """Add a patient: `scores` and `truth` of the voxels that a mask may hold, both 1-D.

        `num_true` counts the true voxels of the whole scan.
        """
        above = np.searchsorted(self.thresholds, scores, side="left")  # thresholds below each score
        predicted = _num_above(above, len(self.thresholds))
        hits = _num_above(above[truth], len(self.thresholds))
        total = predicted + num_true
        self._dice_sum += np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0)
        self._num_defined += total > 0

    def best(self) -> dict[str, float | None]:
        """The threshold of the highest mean Dice; None where Dice is defined for no patient."""
        if not self._num_defined.any():
            return {"threshold": None, "dice": None}
        dice = np.where(self._num_defined > 0, self._dice_sum / np.maximum(self._num_defined, 1), 0)
        best = int(np.argmax(dice))
        return {"threshold": float(self.thresholds[best]), "dice": float(dice[best])}


def _num_above(
    num_thresholds_below: npt.NDArray[np.intp], num_thresholds: int
) -> npt.NDArray[np.int64]:
    """For each threshold the number of scores that exceed it."""
    counts = np.bincount(num_thresholds_below, minlength=num_thresholds + 1)
    return np.cumsum(counts[::-1])[::-1][1:]


def candidate_thresholds(sampled: Sequence[Scores], headline_threshold: float) -> Scores:
    """Thresholds for a search, ascending: quantiles that get denser towards the highest score."""
    thresholds = [np.float32(headline_threshold)]
    if sampled:
        scores = np.concatenate(sampled)
        fractions = np.geomspace(1.0, 1.0 / scores.size, NUM_THRESHOLDS)
        thresholds += [
            np.nextafter(scores.min(), np.float32(-np.inf)),
            *np.quantile(scores, 1 - fractions),
        ]
    return np.unique(np.asarray(thresholds, dtype=np.float32))


def _check(scores: Scores) -> None:
    if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(
            f"a threshold needs a non-empty 1-D array of finite scores, got shape {scores.shape}"
        )
