"""Statistics over patients: intervals, paired tests, and their correction.

The unit is always the patient, never the slice: slices of one patient are not independent.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan, nan

import numpy as np
import numpy.typing as npt
from scipy import stats

from cldf_dist.method.metrics import CaseScore

_BATCH_ELEMENTS = 4_000_000  # numbers drawn at a time, which bounds the memory of a resampling


def bootstrap_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over patients, reproducible from the seed.

    It is (nan, nan) for fewer than two patients, and has no width for equal values. With few
    patients any bootstrap interval is too narrow: its coverage is below `confidence`.
    Raises ValueError for values that are not finite and settings out of range.
    """
    patients = _finite(values, name="values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 is customary")
    _check_at_least_one(num_resamples, name="num_resamples")
    if patients.size < 2:
        return nan, nan
    interval = stats.bootstrap(
        (patients,),
        np.mean,
        n_resamples=num_resamples,
        batch=_batch_size(patients.size),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_permutation_test(
    first: Sequence[float],
    second: Sequence[float],
    *,
    num_permutations: int = 20_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of the mean paired difference, by flipping the signs of the differences.

    `first[i]` and `second[i]` are of one patient. All 2**patients sign patterns are enumerated if
    they are at most `num_permutations`. Otherwise that many are drawn and the observed one is
    added, so that the p-value is never 0.
    Raises ValueError for no patients, unequal lengths and values that are not finite.
    """
    first_values, second_values = _finite(first, name="first"), _finite(second, name="second")
    _check_at_least_one(num_permutations, name="num_permutations")
    if first_values.size != second_values.size or not first_values.size:
        raise ValueError(
            f"first and second must hold the same patients, at least one, got {first_values.size} "
            f"and {second_values.size} values; keep the patients that both methods score"
        )
    differences = first_values - second_values
    if differences.size == 1:
        return 1.0  # both sign patterns are equally extreme
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=num_permutations,
        batch=_batch_size(differences.size),
        vectorized=True,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values with Holm's step-down adjustment, in the order given.

    Raises ValueError for a p-value outside [0, 1].
    """
    for name, p_value in p_values.items():
        if not 0 <= p_value <= 1:
            raise ValueError(
                f"p-value of {name!r} must be in [0, 1], got {p_value}; leave out comparisons "
                "that could not be tested"
            )
    adjusted: dict[str, float] = {}
    largest_so_far = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        scaled = (len(p_values) - rank) * float(p_values[name])
        largest_so_far = max(largest_so_far, min(1.0, scaled))
        adjusted[name] = largest_so_far
    return {name: adjusted[name] for name in p_values}


def summarise(
    values: Iterable[float | None],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """Mean over patients and its bootstrap interval: mean, low, high, num_patients, JSON-ready.

    Patients with None (true negatives) are left out and not counted. The mean of no patients and
    the interval of fewer than two are None.
    """
    defined = [value for value in values if value is not None]
    low, high = bootstrap_interval(
        defined, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "low": None if isnan(low) else low,
        "high": None if isnan(high) else high,
        "num_patients": len(defined),
    }


def specificity(scores: Iterable[CaseScore]) -> dict[str, float | int | None]:
    """Fraction of the patients without the object whose prediction is empty too, with the counts.

    Keys: specificity (None where every patient has the object), num_true_negatives and
    num_empty_truth. JSON-ready.
    """
    outcomes = [score.outcome for score in scores]
    num_true_negatives = outcomes.count("true_negative")
    num_empty_truth = num_true_negatives + outcomes.count("false_alarm")
    return {
        "specificity": num_true_negatives / num_empty_truth if num_empty_truth else None,
        "num_true_negatives": num_true_negatives,
        "num_empty_truth": num_empty_truth,
    }


def _batch_size(num_patients: int) -> int:
    return max(1, _BATCH_ELEMENTS // num_patients)


def _finite(values: Sequence[float], *, name: str) -> npt.NDArray[np.float64]:
    """The values as one axis of float64; raises ValueError where one is not a finite number."""
    array = np.asarray(values, dtype=np.float64)  # None becomes NaN
    if array.ndim != 1:
        raise ValueError(f"{name} must be one number per patient, got shape {array.shape}")
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"{name}[{position}] must be finite, got {array[position]}; "
            "leave out patients without a score"
        )
    return array


def _check_at_least_one(count: int, *, name: str) -> None:
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}; 10000 or more gives stable results")
