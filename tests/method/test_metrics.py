"""Metrics: arithmetic by hand, the rules for empty masks, and agreement with MONAI."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from cldf_dist.method.metrics import (
    _by_transform,
    _by_tree,
    auroc,
    largest_component,
    precision_recall,
    score_case,
)

ISOTROPIC = (1.0, 1.0, 1.0)
masks = hypothesis_numpy.arrays(np.bool_, (4, 5, 3))
spacings = st.tuples(*[st.floats(0.25, 6.0)] * 3)


def empty(shape=(6, 8, 5)):
    return np.zeros(shape, dtype=bool)


def box(shape, *ranges):
    """A mask that is true inside the given (start, stop) ranges."""
    mask = empty(shape)
    mask[tuple(slice(start, stop) for start, stop in ranges)] = True
    return mask


def random_blobs(seed, shape, quantile):
    """Smooth random objects, some of them threshold by the border of the volume."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    field = gaussian_filter(noise, sigma=1.5)
    return field > np.quantile(field, quantile)


def hd95_by_distance_transform(prediction, truth, spacing):
    """The definition, written the dense way over the whole volume."""
    surfaces = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    to_truth = distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]
    to_prediction = distance_transform_edt(~surfaces[0], sampling=spacing)[surfaces[1]]
    return max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))


def test_overlapping_boxes_score_as_by_hand():
    truth = box((6, 6, 6), (0, 2), (0, 2), (0, 2))  # 8 voxels
    prediction = box((6, 6, 6), (1, 3), (0, 2), (0, 2))  # 8 voxels, 4 in common, one step away
    score = score_case(prediction, truth, (2.0, 1.0, 5.0))
    assert score.outcome == "overlap"
    assert score.dice == 2 * 4 / 16
    assert score.iou == 4 / 12
    assert score.hd95_mm == 2.0
    assert (score.truth_voxels, score.predicted_voxels) == (8, 8)
    assert score.truth_ml == pytest.approx(8 * 10 / 1000)
    assert score.predicted_ml == pytest.approx(8 * 10 / 1000)


def test_hd95_takes_the_percentile_per_direction_and_then_the_larger_one():
    truth = box((30, 1, 1), (0, 1))
    prediction = truth.copy()
    prediction[20] = True  # distances to the truth: 0 and 20; from the truth: 0
    assert score_case(prediction, truth, ISOTROPIC).hd95_mm == pytest.approx(0.95 * 20)
    assert score_case(truth, prediction, ISOTROPIC).hd95_mm == pytest.approx(0.95 * 20)


def test_disjoint_masks_have_no_overlap_but_a_real_distance():
    score = score_case(
        box((9, 9, 9), (0, 1), (0, 1), (0, 1)), box((9, 9, 9), (3, 4), (4, 5), (0, 1)), ISOTROPIC
    )
    assert (score.outcome, score.dice, score.iou, score.hd95_mm) == ("overlap", 0.0, 0.0, 5.0)


def test_both_empty_is_a_true_negative_without_scores():
    score = score_case(empty(), empty(), ISOTROPIC)
    assert score.outcome == "true_negative"
    assert (score.dice, score.iou, score.hd95_mm) == (None, None, None)
    assert (score.truth_voxels, score.predicted_voxels) == (0, 0)


@pytest.mark.parametrize("outcome", ["miss", "false_alarm"])
def test_one_empty_mask_costs_the_diagonal_of_the_volume(outcome):
    found, nothing = box((6, 8, 5), (1, 2), (1, 2), (1, 2)), empty((6, 8, 5))
    pair = (nothing, found) if outcome == "miss" else (found, nothing)
    score = score_case(*pair, (1.0, 0.5, 3.0))
    assert score.outcome == outcome
    assert (score.dice, score.iou) == (0.0, 0.0)
    assert score.hd95_mm == pytest.approx(sqrt(6**2 + 4**2 + 15**2))
    assert score.truth_ml + score.predicted_ml == pytest.approx(1.5 / 1000)


# MONAI 1.6.1 warns about an argument that it passes to itself
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("spacing", [ISOTROPIC, (0.7, 0.7, 5.0), (3.0, 0.5, 1.2)])
@pytest.mark.parametrize("seed", range(6))
def test_dice_and_hd95_agree_with_monai(seed, spacing):
    prediction = random_blobs(seed, (17, 22, 9), quantile=0.9)
    truth = random_blobs(seed + 100, (17, 22, 9), quantile=0.8)
    if seed % 2:  # objects that end at the border of the volume
        prediction[:3, :4, :] = True
        truth[:2, :, -2:] = True
    ours = score_case(prediction, truth, spacing)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    dice = compute_dice(*tensors, include_background=True)
    hd95 = compute_hausdorff_distance(
        *tensors, include_background=True, percentile=95, spacing=spacing
    )
    assert ours.dice == pytest.approx(dice.item(), rel=1e-6)
    assert ours.hd95_mm == pytest.approx(hd95.item(), rel=1e-5)


@given(prediction=masks, truth=masks, spacing=spacings)
@settings(max_examples=80, deadline=None)
def test_scores_are_symmetric_and_bounded_and_follow_the_definition(prediction, truth, spacing):
    score, swapped = (
        score_case(prediction, truth, spacing),
        score_case(truth, prediction, spacing),
    )
    assert (score.dice, score.iou, score.hd95_mm) == (swapped.dice, swapped.iou, swapped.hd95_mm)
    if score.outcome == "true_negative":
        return
    assert 0 <= score.iou <= score.dice <= 1
    assert score.dice == pytest.approx(2 * score.iou / (1 + score.iou))
    diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    if score.outcome == "overlap":
        expected = hd95_by_distance_transform(prediction, truth, spacing)
        assert score.hd95_mm == pytest.approx(expected, rel=1e-9)
        assert score.hd95_mm < diagonal
    else:
        assert score.hd95_mm == pytest.approx(diagonal)


@given(mask=masks.filter(lambda mask: mask.any()), spacing=spacings)
@settings(max_examples=40, deadline=None)
def test_a_mask_agrees_perfectly_with_itself(mask, spacing):
    score = score_case(mask, mask, spacing)
    assert (score.dice, score.iou, score.hd95_mm) == (1.0, 1.0, 0.0)


def test_scores_do_not_depend_on_memory_layout_or_place_in_the_volume():
    prediction = random_blobs(1, (10, 11, 7), quantile=0.7)
    truth = random_blobs(2, (10, 11, 7), quantile=0.7)
    plain = score_case(prediction, truth, (1.0, 2.0, 3.0))
    fortran = score_case(np.asfortranarray(prediction), truth[::-1, ::-1][::-1, ::-1], (1, 2, 3))
    padding = ((2, 5), (0, 4), (3, 3))
    padded = score_case(np.pad(prediction, padding), np.pad(truth, padding), (1.0, 2.0, 3.0))
    assert plain == fortran == padded


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "message"),
    [
        (empty((3, 3, 3)), empty((3, 3, 4)), ISOTROPIC, "one shape.*grid of the truth"),
        (
            empty().astype(np.uint8),
            empty(),
            ISOTROPIC,
            "prediction must be a boolean NumPy array.*threshold",
        ),
        (empty(), empty().astype(np.float32), ISOTROPIC, "truth must be a boolean"),
        (empty((3, 3)), empty((3, 3)), ISOTROPIC, "last axis"),
        (empty((3, 0, 3)), empty((3, 0, 3)), ISOTROPIC, "at least one voxel"),
        (empty(), empty(), (1.0, 0.0, 1.0), "positive finite"),
        (empty(), empty(), (1.0, -1.0, 1.0), "positive finite"),
        (empty(), empty(), (1.0, float("nan"), 1.0), "positive finite"),
        (empty(), empty(), (1.0, float("inf"), 1.0), "positive finite"),
        (empty(), empty(), (1.0, 1.0), "three"),
    ],
)
def test_unusable_input_is_refused_with_the_reason(prediction, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        score_case(prediction, truth, spacing)


def test_largest_component_keeps_the_biggest_and_joins_corners():
    mask = box((8, 8, 4), (0, 2), (0, 2), (0, 1))  # 4 voxels ...
    mask[2, 2, 1] = True  # ... and a fifth by a corner
    mask[5:7, 5:7, 3] = True  # 4 voxels apart
    kept = largest_component(mask)
    assert kept.dtype == np.bool_
    assert kept.sum() == 5
    assert kept[2, 2, 1]
    assert not kept[5:].any()
    assert np.array_equal(largest_component(mask[..., 0]), mask[..., 0])  # 2-D


def test_largest_component_leaves_empty_and_single_objects_and_its_input_alone():
    for mask in (empty(), box((4, 4, 4), (1, 3), (1, 3), (1, 3))):
        kept = largest_component(mask)
        assert np.array_equal(kept, mask)
        assert not np.shares_memory(kept, mask)
    with pytest.raises(ValueError, match="boolean"):
        largest_component(empty().astype(np.int64))


def test_largest_component_breaks_a_tie_by_the_first():
    mask = np.array([True, True, False, True, True])
    assert largest_component(mask).tolist() == [True, True, False, False, False]


def test_precision_and_recall_by_hand():
    predicted = np.array([True, True, True, False, False])
    truth = np.array([True, False, False, True, False])
    assert precision_recall(predicted, truth) == (1 / 3, 1 / 2)
    nothing = np.zeros(5, dtype=bool)
    assert precision_recall(nothing, truth) == (None, 0.0)
    assert precision_recall(predicted, nothing) == (0.0, None)
    with pytest.raises(ValueError, match="one shape"):
        precision_recall(predicted, truth[:4])


def test_auroc_by_hand_with_a_tie_counting_half():
    labels = np.array([True, True, False, False])
    assert auroc([0.9, 0.8, 0.2, 0.1], labels) == 1.0
    assert auroc([0.1, 0.2, 0.8, 0.9], labels) == 0.0
    assert auroc([0.5, 0.5, 0.5, 0.5], labels) == 0.5
    assert auroc([0.9, 0.5, 0.5, 0.1], labels) == (4 - 0.5) / 4


@given(
    hypothesis_numpy.arrays(np.float64, 12, elements=st.integers(-3, 3)),
    hypothesis_numpy.arrays(np.bool_, 12),
)
@settings(max_examples=60, deadline=None)
def test_auroc_is_the_share_of_ordered_pairs(scores, labels):
    positives, negatives = scores[labels], scores[~labels]
    if not positives.size or not negatives.size:
        assert auroc(scores, labels) is None
        return
    gaps = positives[:, None] - negatives
    assert auroc(scores, labels) == pytest.approx(((gaps > 0) + (gaps == 0) / 2).mean())
    assert auroc(scores, labels) == pytest.approx(1 - auroc(-scores, labels))


def test_auroc_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="finite"):
        auroc([0.1, float("nan")], [True, False])
    with pytest.raises(ValueError, match="one shape"):
        auroc([0.1, 0.2, 0.3], [True, False])
    with pytest.raises(ValueError, match="labels must be a boolean"):
        auroc([0.1, 0.2], [1, 0])


@pytest.mark.parametrize("seed", range(4))
def test_tree_and_transform_give_the_same_distances(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, 13, 11, 7)) < (0.02, 0.2, 0.5, 0.9)[seed]
    first[0, 0, 0] = second[-1, -1, -1] = True
    spacing = (0.7, 1.3, 5.0)
    for one, other in zip(_by_tree(first, second, spacing), _by_transform(first, second, spacing)):
        np.testing.assert_allclose(one, other, rtol=1e-12)
