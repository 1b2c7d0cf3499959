"""The published slice rules by hand, and against a dense definition of their distance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy.ndimage import binary_erosion, distance_transform_edt

from cldf_dist.method.metrics import largest_component, score_case
from cldf_dist.method.slice_metrics import largest_components, slice_score

masks = st.one_of(
    hypothesis_numpy.arrays(np.bool_, (7, 6)),
    hypothesis_numpy.arrays(np.bool_, (7, 6), elements=st.integers(0, 9).map(lambda n: n > 7)),
)


def empty(shape=(8, 8)):
    return np.zeros(shape, dtype=bool)


def box(rows, columns, shape=(8, 8)):
    mask = empty(shape)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def pooled_hd95(prediction, truth):
    """95th percentile of the surface distances of both directions, in an array of any dimension.

    Surface pixels have a face neighbour outside the mask; beyond the array is outside.
    """
    if not prediction.any() or not truth.any():
        return 0.0
    surfaces = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    distances = [
        distance_transform_edt(~surfaces[1])[surfaces[0]],
        distance_transform_edt(~surfaces[0])[surfaces[1]],
    ]
    return np.percentile(np.concatenate(distances), 95)


def test_overlapping_boxes_score_as_by_hand():
    truth = box((0, 2), (0, 2))  # 4 pixels
    prediction = box((0, 2), (1, 3))  # 4 pixels, 2 in common
    score = slice_score(prediction, truth)
    assert score.dice == pytest.approx((2 * 2 + 1e-5) / (4 + 4 + 1e-5), rel=1e-12)
    assert score.iou == pytest.approx((2 + 1e-5) / (6 + 1e-5), rel=1e-12)
    assert score.hd95_pixels == 1.0
    assert score.hd95_contour_pixels == 1.0


def test_an_empty_prediction_has_dice_0_and_the_best_distance():
    score = slice_score(empty(), box((2, 6), (2, 6)))
    assert score.dice == pytest.approx(0, abs=1e-6)
    assert score.iou == pytest.approx(0, abs=1e-6)
    assert (score.hd95_pixels, score.hd95_contour_pixels) == (0.0, 0.0)


def test_masks_that_are_both_empty_agree_perfectly():
    score = slice_score(empty(), empty())
    assert (score.dice, score.iou, score.hd95_pixels) == (1.0, 1.0, 0.0)


def test_published_distance_counts_every_pixel_as_surface():
    """Two far pixels are 2 of 52 pixels, under 5 %, but 2 of 34 on the contours."""
    truth = box((0, 5), (0, 5), (5, 30))
    prediction = truth.copy()
    prediction[[0, 4], 29] = True  # 25 pixels from the truth
    score = slice_score(prediction, truth)
    assert score.hd95_pixels == 0
    contours = [0] * 32 + [25, 25]  # 16 pixels around each box
    assert score.hd95_contour_pixels == pytest.approx(np.percentile(contours, 95))
    assert score.hd95_contour_pixels > 0


def test_distance_pools_both_directions_unlike_the_strict_one():
    truth = box((0, 1), (0, 1), (40, 1))
    prediction = truth.copy()
    prediction[30] = True  # pooled distances: 0, 30, 0
    score = slice_score(prediction, truth)
    assert score.hd95_pixels == pytest.approx(np.percentile([0, 30, 0], 95))
    strict = score_case(prediction[..., None], truth[..., None], (1, 1, 1)).hd95_mm
    assert score.hd95_pixels < strict


@given(prediction=masks, truth=masks)
@settings(max_examples=150, deadline=None)
def test_distances_equal_the_dense_definition_on_a_batch_of_one_and_on_the_slice(prediction, truth):
    score = slice_score(prediction, truth)
    assert score.hd95_pixels == pytest.approx(pooled_hd95(prediction[None], truth[None]))
    assert score.hd95_contour_pixels == pytest.approx(pooled_hd95(prediction, truth))
    assert score == slice_score(truth, prediction)
    assert score == slice_score(prediction[::-1].T, truth[::-1].T)


def test_unusable_masks_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="prediction must be a boolean"):
        slice_score(empty().astype(int), empty())
    with pytest.raises(ValueError, match="one shape"):
        slice_score(empty(), empty((8, 9)))


def test_the_smaller_blob_is_removed():
    large, small = box((0, 3), (0, 3)), box((5, 7), (5, 7))
    np.testing.assert_array_equal(largest_components(large | small), large)


def test_corners_do_not_connect():
    large, corner = box((0, 3), (0, 3)), box((3, 4), (3, 4))
    np.testing.assert_array_equal(largest_components(large | corner), large)
    np.testing.assert_array_equal(largest_component(large | corner), large | corner)


def test_equally_large_components_are_all_kept():
    both = box((0, 2), (0, 2)) | box((4, 6), (4, 6))
    np.testing.assert_array_equal(largest_components(both | box((7, 8), (0, 3))), both)


def test_empty_and_single_components_are_copied():
    for mask in (empty(), box((1, 3), (1, 3))):
        kept = largest_components(mask)
        np.testing.assert_array_equal(kept, mask)
        assert not np.shares_memory(kept, mask)
