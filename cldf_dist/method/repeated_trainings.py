"""Means and differences over several trainings, each of which scores every test patient once.

Scores are arrays (trainings, patients), NaN where a score is undefined (a true negative). The test
patients are the same in all trainings, so a resample draws trainings and patients independently and
crosses them. Separate patients for each training would average out the variance between patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
import numpy.typing as npt

from cldf_dist.method.statistics import paired_permutation_test

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """One method minus another, over the patients that both score in some training."""

    difference: float | None  # mean over trainings of the mean over patients
    low: float | None  # over trainings and patients
    high: float | None
    p: float | None  # two-sided, over patients, for these trainings
    of_trainings: tuple[float | None, ...]
    num_patients: int
    num_better: tuple[int, ...]  # patients, in each training
    num_worse: tuple[int, ...]
    num_compared: tuple[int, ...]


def mean_of_trainings(scores: Scores) -> float | None:
    """The mean over trainings of their means over patients; None where nothing is defined."""
    means = training_means(scores)
    defined = [mean for mean in means if mean is not None]
    return float(np.mean(defined)) if defined else None


def training_means(scores: Scores) -> list[float | None]:
    """For each training the mean over its patients with a score."""
    _check(scores)
    rows = [row[~np.isnan(row)] for row in scores]
    return [float(row.mean()) if row.size else None for row in rows]


def crossed_interval(
    scores: Scores, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `mean_of_trainings`, over trainings and patients.

    Both are drawn with replacement; a resample has the same patients for all drawn trainings. With
    one training it is the interval over patients. With fewer than two scored patients it is
    undefined: (nan, nan). With few trainings or few patients it is too narrow.
    """
    _check(scores)
    defined = ~np.isnan(scores)
    if defined.any(axis=0).sum() < 2:
        return nan, nan
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"confidence must be in (0, 1) and num_resamples >= 1, got {confidence} and "
            f"{num_resamples}; 0.95 and 10000 are customary"
        )
    num_trainings, num_patients = scores.shape
    rng = np.random.default_rng(seed)
    drawn = _draw_counts(rng, num_resamples, num_patients)
    counts = drawn @ defined.T.astype(float)  # (resamples, trainings)
    with np.errstate(invalid="ignore"):
        means = drawn @ np.where(defined, scores, 0).T / counts
    weights = np.where(counts > 0, _draw_counts(rng, num_resamples, num_trainings), 0)
    total = weights.sum(axis=1)
    resampled = (weights * np.where(counts > 0, means, 0)).sum(axis=1)[total > 0] / total[total > 0]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def paired_over_trainings(
    first: Scores,
    second: Scores,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """`first` minus `second`: the mean over trainings of that over the patients that both score.

    The interval is over trainings and patients (`crossed_interval`). The two-sided permutation test
    is over patients alone, on each patient's difference averaged over its trainings. Its p-value
    holds for these trainings, since three trainings are too few for a test over trainings.

    Raises ValueError where the shapes differ.
    """
    _check(first)
    if first.shape != second.shape:
        raise ValueError(
            "both methods must have the same trainings and patients, got shapes "
            f"{first.shape} and {second.shape}"
        )
    differences = first - second
    compared = ~np.isnan(differences)
    kept = compared.any(axis=0)
    of_patients = np.nanmean(differences[:, kept], axis=0).tolist() if kept.any() else []
    low, high = crossed_interval(
        differences, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    zeros = [0.0] * len(of_patients)
    return PairedDifference(
        difference=mean_of_trainings(differences),
        low=None if np.isnan(low) else low,
        high=None if np.isnan(high) else high,
        p=paired_permutation_test(of_patients, zeros, seed=seed) if of_patients else None,
        of_trainings=tuple(training_means(differences)),
        num_patients=len(of_patients),
        num_better=_counted(differences > 0),
        num_worse=_counted(differences < 0),
        num_compared=_counted(compared),
    )


def _counted(claims: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Number of patients for whom the claim holds, in each training."""
    return tuple(int(number) for number in claims.sum(axis=1))


def _draw_counts(
    rng: np.random.Generator, num_resamples: int, count: int
) -> npt.NDArray[np.float64]:
    """The number of times that each of `count` items is resampled, (resamples, count)."""
    return rng.multinomial(count, [1 / count] * count, size=num_resamples).astype(np.float64)


def _check(scores: Scores) -> None:
    if scores.ndim != 2 or not scores.size or np.isinf(scores).any():
        raise ValueError(
            "scores must be (trainings, patients), finite or NaN where undefined, at least one of "
            f"each, got shape {scores.shape}"
        )
