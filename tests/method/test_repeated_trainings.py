"""Statistics over several trainings of the same test patients, against small cases by hand."""

from math import isnan, nan

import numpy as np
import pytest

from cldf_dist.method.repeated_trainings import (
    crossed_interval,
    mean_of_trainings,
    paired_over_trainings,
    training_means,
)
from cldf_dist.method.statistics import bootstrap_interval, paired_permutation_test


def test_means_leave_true_negatives_out() -> None:
    scores = np.array([[0.2, 0.4, nan], [0.6, nan, nan], [nan, nan, nan]])
    assert training_means(scores) == [pytest.approx(0.3), pytest.approx(0.6), None]
    assert mean_of_trainings(scores) == pytest.approx(0.45), "each training weighs the same"
    assert mean_of_trainings(np.full((2, 2), nan)) is None


def test_one_training_gives_the_interval_over_patients() -> None:
    values = np.random.default_rng(3).random(12)
    found = crossed_interval(values[None], num_resamples=40_000)
    assert found == pytest.approx(bootstrap_interval(list(values)), abs=0.01)


def test_patients_who_agree_leave_the_spread_of_trainings() -> None:
    # both trainings are 0 or both 1 in a quarter of the resamplings each: beyond 2.5 %
    assert crossed_interval(np.array([[0.0] * 9, [1.0] * 9])) == (0.0, 1.0)
    assert crossed_interval(np.full((3, 4), 0.7)) == (pytest.approx(0.7), pytest.approx(0.7))


def test_more_trainings_of_the_same_two_patients_do_not_narrow_the_interval() -> None:
    """As they would where each training drew patients of its own."""
    assert crossed_interval(np.tile([0.0, 1.0], (10, 1))) == (0.0, 1.0)


def test_the_interval_covers_both_sources_of_spread() -> None:
    rng = np.random.default_rng(0)
    patients, trainings = rng.normal(0, 0.1, 10), rng.normal(0, 0.1, 5)
    both = 0.5 + trainings[:, None] + patients[None]

    def width(scores: np.ndarray) -> float:
        low, high = crossed_interval(scores)
        return high - low

    of_patients, of_trainings = width(both[:1]), width(both[:, :1].repeat(10, axis=1))
    expected = np.hypot(of_patients, of_trainings)
    assert width(both) == pytest.approx(expected, rel=0.1)


def test_an_undefined_score_is_not_drawn_as_a_number() -> None:
    scores = np.array([[0.5, 0.5, nan], [0.5, nan, 0.5]])
    assert crossed_interval(scores) == (pytest.approx(0.5), pytest.approx(0.5))
    low, high = crossed_interval(np.array([[0.5, nan], [0.4, nan]]))
    assert isnan(low)
    assert isnan(high)


def test_differences_are_averaged_over_trainings_for_each_patient() -> None:
    first = np.array([[0.9, 0.5, 0.3], [0.7, 0.5, nan]])
    second = np.array([[0.5, 0.6, 0.3], [0.5, 0.4, 0.9]])
    found = paired_over_trainings(first, second)
    # trainings: (0.4 - 0.1 + 0) / 3 and (0.2 + 0.1) / 2
    assert found.difference == pytest.approx(0.125)
    assert found.num_better == (1, 2)
    assert found.num_worse == (1, 0)
    assert found.num_compared == (3, 2)
    assert found.num_patients == 3
    assert found.p == paired_permutation_test([0.3, 0.0, 0.0], [0.0] * 3)
    assert found.of_trainings == (pytest.approx(0.1), pytest.approx(0.15))
    assert (found.low, found.high) == crossed_interval(first - second)


def test_a_difference_that_one_training_reverses_is_not_established() -> None:
    """However surely the patients agree, within each training."""
    second = np.zeros((3, 12))
    first = second + np.array([[0.13], [0.07], [-0.02]])
    found = paired_over_trainings(first, second)
    assert found.p is not None
    assert found.p < 0.001
    assert found.low is not None
    assert found.low < 0 < found.difference


def test_without_a_common_patient_there_is_no_difference() -> None:
    found = paired_over_trainings(np.array([[0.5, nan]]), np.array([[nan, 0.5]]))
    assert (found.difference, found.low, found.high, found.p) == (None, None, None, None)
    assert (found.num_patients, found.num_compared) == (0, (0,))


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 3)), np.array([[np.inf]])])
def test_scores_that_are_no_table_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be \\(trainings, patients\\)"):
        training_means(scores)


def test_two_tables_must_hold_the_same_trainings() -> None:
    with pytest.raises(ValueError, match="same trainings and patients"):
        paired_over_trainings(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="confidence must be in"):
        crossed_interval(np.zeros((2, 3)), confidence=95.0)
