import numpy as np
import pytest

from cldf_dist.method.weak_validation import area_fractions, weak_validation


def test_fractions_are_of_the_subject_alone():
    scores = np.array([[[0.9, 0.9], [0.1, 0.9]], [[0.9, 0.9], [0.9, 0.9]]])
    subject = np.array([[[1, 1], [1, 0]], [[0, 0], [0, 0]]], dtype=bool)
    np.testing.assert_allclose(area_fractions(scores, subject, 0.5), [2 / 3, 0])
    np.testing.assert_array_equal(area_fractions(scores, subject, 0.9), [0, 0])  # strictly above


def test_only_slices_of_known_label_count():
    labels = np.array([1, 1, 0, 0, -1, -2])
    fractions = np.array([0.5, 0.1, 0.2, 0.1, 9.0, 9.0])
    found = weak_validation(fractions, labels)
    assert found["area_auroc"] == pytest.approx((2 + 0 + 0.5) / 4)  # pairs won, and half a tie
    assert found["false_area"] == pytest.approx(0.15)
    assert found["num_slices"] == 4


def test_one_class_leaves_nothing_to_tell_apart():
    found = weak_validation(np.array([0.5, 0.1]), np.array([1, 1]))
    assert found == {"area_auroc": None, "false_area": None, "num_slices": 2}
    with pytest.raises(ValueError, match="one number per slice"):
        weak_validation(np.zeros(3), np.zeros(2, dtype=int))
