"""Statistics over patients: arithmetic by hand and simulations small enough to repeat."""

import json
from itertools import product
from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cldf_dist.method.metrics import score_case
from cldf_dist.method.statistics import (
    bootstrap_interval,
    holm,
    paired_permutation_test,
    specificity,
    summarise,
)

patient_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def exact_sign_flip_p_value(differences):
    """The definition: the share of sign patterns whose mean is at least as far from 0."""
    patterns = np.array(list(product([1, -1], repeat=len(differences))))
    distances = np.abs(patterns @ np.array(differences))
    return float(np.mean(distances >= abs(sum(differences)) - 1e-9))


def test_interval_holds_the_mean_and_widens_with_confidence():
    values = np.random.default_rng(0).uniform(size=30).tolist()
    low, high = bootstrap_interval(values, num_resamples=2000)
    wide_low, wide_high = bootstrap_interval(values, confidence=0.99, num_resamples=2000)
    assert wide_low < low < np.mean(values) < high < wide_high


def test_interval_is_close_to_the_normal_one_for_many_patients():
    values = np.random.default_rng(1).normal(0.7, 0.1, size=400)
    low, high = bootstrap_interval(values.tolist())
    half_width = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half_width, abs=0.05 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.05 * half_width)


def test_interval_is_a_function_of_the_seed():
    values = [0.1, 0.5, 0.6, 0.9, 0.95]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    many = np.random.default_rng(2).uniform(size=50).tolist()
    assert bootstrap_interval(many, seed=3) != bootstrap_interval(many, seed=4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_patients", [2, 7])
def test_interval_of_equal_values_has_no_width(value, num_patients):
    interval = bootstrap_interval([value] * num_patients, num_resamples=100)
    assert interval == pytest.approx((value, value))


@pytest.mark.parametrize("values", [[], [0.4]])
def test_interval_of_fewer_than_two_patients_is_undefined(values):
    assert all(isnan(end) for end in bootstrap_interval(values))


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    num_studies = 300
    covered = 0
    for _ in range(num_studies):
        study = generator.beta(5, 2, size=40).tolist()
        low, high = bootstrap_interval(study, confidence=0.9, num_resamples=400)
        covered += low <= 5 / 7 <= high
    # 300 studies: three standard errors of a share of 0.9 are 0.052
    assert covered / num_studies == pytest.approx(0.9, abs=0.052)


def test_permutation_test_by_hand():
    assert paired_permutation_test([3.0, 5.0], [2.0, 3.0]) == 2 / 4  # +-1 +-2: only +-3 as extreme
    assert paired_permutation_test([0.5] * 6, [0.4] * 6) == 2 / 64
    assert paired_permutation_test([0.5] * 6, [0.5] * 6) == 1.0
    assert paired_permutation_test([0.9], [0.1]) == 1.0


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_few_patients_are_enumerated_exactly(differences):
    p_value = paired_permutation_test(differences, [0] * len(differences))
    assert p_value == pytest.approx(exact_sign_flip_p_value(differences))


def test_exact_p_values_are_uniform_under_the_null():
    """Every sign pattern is equally likely then; sizes 1, 2, 4, ... leave no ties."""
    sizes = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    patterns = product([1, -1], repeat=sizes.size)
    p_values = [
        paired_permutation_test((sizes * pattern).tolist(), [0.0] * sizes.size)
        for pattern in patterns
    ]
    levels = [2 * step / 32 for step in range(1, 17)]
    assert sorted(p_values) == pytest.approx(np.repeat(levels, 2).tolist())


def test_exact_and_drawn_p_values_agree():
    generator = np.random.default_rng(7)
    first, second = generator.uniform(size=12), generator.uniform(size=12) - 0.2
    exact = paired_permutation_test(first, second, num_permutations=2**12)
    drawn = paired_permutation_test(first, second, num_permutations=2**12 - 1)
    assert exact != drawn
    assert exact == pytest.approx(drawn, abs=0.03)


def test_drawn_p_value_is_never_zero_and_repeats_with_the_seed():
    first, second = np.full(60, 0.9), np.linspace(0.1, 0.5, 60)
    p_value = paired_permutation_test(first, second, num_permutations=999)
    assert 0 < p_value <= 2 / 1000
    assert p_value == paired_permutation_test(first, second, num_permutations=999)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12),
    st.sampled_from([100, 4096]),
)
@settings(max_examples=30, deadline=None)
def test_permutation_test_does_not_care_which_method_comes_first(pairs, num_permutations):
    first, second = [list(values) for values in zip(*pairs)]
    p_value = paired_permutation_test(first, second, num_permutations=num_permutations)
    assert 0 < p_value <= 1
    assert p_value == paired_permutation_test(second, first, num_permutations=num_permutations)


def test_permutation_test_refuses_unpaired_and_undefined_values():
    with pytest.raises(ValueError, match=r"same patients.*2 and 1"):
        paired_permutation_test([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="at least one"):
        paired_permutation_test([], [])
    with pytest.raises(ValueError, match=r"second\[1\] must be finite.*leave out"):
        paired_permutation_test([0.1, 0.2], [0.3, None])
    with pytest.raises(ValueError, match="num_permutations must be >= 1"):
        paired_permutation_test([0.1, 0.2], [0.3, 0.4], num_permutations=0)


def test_holm_by_hand_keeps_the_order_of_the_names():
    adjusted = holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.005})
    assert list(adjusted) == ["c", "a", "d", "b"]
    # sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 raised to its predecessor
    assert adjusted == pytest.approx({"b": 0.02, "a": 0.03, "c": 0.06, "d": 0.06})


def test_holm_is_capped_at_one_and_leaves_a_single_test_alone():
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"only": 0.04}) == {"only": 0.04}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_nor_changes_their_order(p_values):
    adjusted = holm(p_values)
    names = sorted(p_values, key=lambda name: p_values[name])
    assert all(p_values[name] <= adjusted[name] <= 1 for name in names)
    in_order = [adjusted[name] for name in names]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("p_value", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_probability(p_value):
    with pytest.raises(ValueError, match=r"'cam' must be in \[0, 1\]"):
        holm({"cldf": 0.5, "cam": p_value})


def test_summary_leaves_out_true_negatives_and_is_json():
    summary = summarise([0.2, None, 0.6, None, 0.7])
    assert summary["mean"] == pytest.approx(0.5)
    assert (summary["low"], summary["high"]) == bootstrap_interval([0.2, 0.6, 0.7])
    assert summary["num_patients"] == 3
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_of_too_few_patients_says_none():
    undefined = {"mean": None, "low": None, "high": None, "num_patients": 0}
    assert summarise([]) == summarise([None, None]) == undefined
    assert summarise([0.5]) == {"mean": 0.5, "low": None, "high": None, "num_patients": 1}


@given(patient_values)
@settings(max_examples=30, deadline=None)
def test_summary_brackets_the_mean_within_the_range_of_the_values(values):
    summary = summarise(values, num_resamples=200)
    if len(values) > 1:
        rounding = 1e-12
        assert min(values) - rounding <= summary["low"] <= summary["high"]
        assert summary["high"] <= max(values) + rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=r"values\[1\] must be finite"):
        summarise([0.5, value])
    with pytest.raises(ValueError, match=r"values\[1\] must be finite"):
        bootstrap_interval([0.5, value])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        bootstrap_interval([0.1, 0.2], confidence=95)
    with pytest.raises(ValueError, match="num_resamples must be >= 1"):
        bootstrap_interval([0.1, 0.2], num_resamples=0)


def test_specificity_counts_only_patients_without_the_object():
    healthy, ill = np.zeros((3, 3, 3), dtype=bool), np.ones((3, 3, 3), dtype=bool)
    cases = [(healthy, healthy), (healthy, healthy), (ill, healthy), (healthy, ill), (ill, ill)]
    scores = [score_case(prediction, truth, (1.0, 1.0, 1.0)) for prediction, truth in cases]
    assert specificity(scores) == {
        "specificity": 2 / 3,
        "num_true_negatives": 2,
        "num_empty_truth": 3,
    }
    assert specificity(scores[3:])["specificity"] is None
    assert specificity(iter(scores)) == specificity(scores)
