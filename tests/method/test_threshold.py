import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cldf_dist.method.threshold import (
    OracleSearch,
    candidate_thresholds,
    negative_threshold,
    otsu_threshold,
)


def best_threshold(scores, truth):
    pooled = [np.asarray(values, np.float32) for values in scores]
    search = OracleSearch(candidate_thresholds(pooled, float(np.median(np.concatenate(pooled)))))
    for values, mask in zip(pooled, truth):
        search.add(values, mask, int(mask.sum()))
    best = search.best()
    return best["threshold"], best["dice"]


def test_negative_cut_by_hand():
    scores = np.arange(100, dtype=np.float32)
    assert negative_threshold(scores, 0.0) == 99
    assert negative_threshold(scores, 0.01) == 98
    assert negative_threshold(scores, 0.055) == 94
    assert negative_threshold(np.array([0.0, 1.0, 1.0, 1.0]), 0.5) == 1


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=40),
    fraction=st.floats(0, 0.99),
)
def test_at_most_the_fraction_lies_above_and_no_lower_cut_would_do(values, fraction):
    scores = np.array(values, dtype=np.float64)
    threshold = negative_threshold(scores, fraction)
    assert (scores > threshold).sum() <= fraction * len(scores)
    lower = scores[scores < threshold]
    if len(lower):
        assert (scores > lower.max()).sum() > np.floor(fraction * len(scores))


def test_otsu_separates_two_heaps_and_survives_a_constant():
    scores = np.concatenate([np.random.default_rng(0).normal(m, 0.1, 500) for m in (0, 3)])
    threshold = otsu_threshold(scores)
    assert ((scores > threshold) == (np.arange(1000) >= 500)).all()
    assert otsu_threshold(np.full(10, 0.25)) == 0.25


def test_oracle_cut_finds_the_perfect_cut():
    truth = [np.arange(50) >= 40, np.arange(30) >= 20]
    scores = [np.where(t, 0.9, 0.1) for t in truth]
    threshold, dice = best_threshold(scores, truth)
    assert dice == 1
    assert 0.1 <= threshold < 0.9


def test_oracle_cut_is_the_best_of_brute_force():
    rng = np.random.default_rng(1)
    truth = [rng.random(60) < share for share in (0.3, 0.1, 0.0)]
    scores = [(rng.random(60) + 0.5 * t).astype(np.float32) for t in truth]
    threshold, dice = best_threshold(scores, truth)

    def mean_dice(c: float) -> float:
        values = []
        for s, t in zip(scores, truth):
            p = s > c
            if p.any() or t.any():
                values.append(2 * (p & t).sum() / (p.sum() + t.sum()))
        return float(np.mean(values))

    assert dice == pytest.approx(mean_dice(threshold))
    best = max(mean_dice(c) for c in np.concatenate(scores))
    assert dice >= best - 0.02


def test_a_false_alarm_in_a_healthy_patient_counts_zero():
    scores = [np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.1, 0.5])]
    truth = [np.array([False, True, True]), np.zeros(3, bool)]
    threshold, dice = best_threshold(scores, truth)
    assert 0.5 <= threshold < 1  # below 0.5 the second patient would enter the mean with 0
    assert dice == pytest.approx(2 / 3)


@pytest.mark.parametrize("scores", [np.zeros((2, 2)), np.array([]), np.array([0.0, np.nan])])
def test_unusable_scores_are_refused(scores):
    with pytest.raises(ValueError, match="non-empty 1-D array of finite scores"):
        negative_threshold(scores, 0.1)
    with pytest.raises(ValueError, match="non-empty 1-D array of finite scores"):
        otsu_threshold(scores)


def test_impossible_fraction_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        negative_threshold(np.arange(3.0), 1.0)


def test_oracle_cut_is_exclusive():
    search = OracleSearch(np.array([0.5, 1.0], np.float32))
    search.add(np.ones(4, np.float32), np.ones(4, bool), 4)
    assert search.best() == {"threshold": 0.5, "dice": 1.0}
    at_the_score = OracleSearch(np.array([1.0], np.float32))
    at_the_score.add(np.ones(4, np.float32), np.ones(4, bool), 4)
    assert at_the_score.best()["dice"] == 0
