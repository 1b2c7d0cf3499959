"""Agreement of a mask with the truth, with an explicit rule for every empty mask.

`score_case` is the strict protocol: a whole patient in 3-D, distances in mm, and a penalty for a
missed object and for a false alarm. The slice-level protocol of earlier publications is in
`slice_metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import (
    binary_erosion,
    distance_transform_edt,
    generate_binary_structure,
    label,
)
from scipy.spatial import KDTree
from scipy.stats import rankdata

Mask = npt.NDArray[np.bool_]
VOXELS_PER_QUERY = 100  # of a distance transform, in the time of one query to a tree
Outcome = Literal["overlap", "miss", "false_alarm", "true_negative"]


@dataclass(frozen=True)
class CaseScore:
    """One patient. `None` marks a true negative: it enters the specificity, not the means.

    The outcome "overlap" means that neither mask is empty; they may still be disjoint (Dice 0).
    """

    dice: float | None
    iou: float | None
    hd95_mm: float | None
    outcome: Outcome
    truth_voxels: int
    predicted_voxels: int
    truth_ml: float
    predicted_ml: float


def score_case(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> CaseScore:
    """Score one patient's prediction against the truth, both (x, y, slices); `spacing` is in mm.

    Both empty: a true negative, no Dice, IoU or distance. Only the prediction empty (miss) or only
    the truth empty (false alarm): Dice 0, IoU 0, and as HD95 the diagonal of the volume, which no
    distance inside it can exceed. Otherwise HD95 is taken per direction over the surface voxels
    (those with a face neighbour outside the mask; beyond the border is outside), linearly
    interpolated, and the larger of the two directions counts.
    Raises ValueError for masks that are not boolean, not 3-D, empty arrays or of unequal shape, and
    for a spacing that is not three positive finite numbers.
    """
    check_masks(prediction, truth, num_dimensions=3)
    spacing_mm = _checked_spacing(spacing)
    intersection, num_predicted, num_true = _voxel_counts(prediction, truth)
    outcome = _outcome(num_predicted, num_true)
    voxel_ml = prod(spacing_mm) / 1000.0
    dice = iou = hd95_mm = None
    if outcome == "overlap":
        dice, iou = _dice_and_iou(intersection, num_predicted, num_true)
        to_truth, to_prediction = _surface_distances(prediction, truth, spacing_mm)
        hd95_mm = max(_percentile_95(to_truth), _percentile_95(to_prediction))
    elif outcome != "true_negative":
        dice, iou, hd95_mm = 0.0, 0.0, _diagonal(truth.shape, spacing_mm)
    return CaseScore(
        dice=dice,
        iou=iou,
        hd95_mm=hd95_mm,
        outcome=outcome,
        truth_voxels=num_true,
        predicted_voxels=num_predicted,
        truth_ml=num_true * voxel_ml,
        predicted_ml=num_predicted * voxel_ml,
    )


def largest_component(mask: Mask) -> Mask:
    """Keep the largest connected component of a mask of any dimension; a tie keeps the first.

    Voxels that touch by a face, an edge or a corner are connected. An empty mask stays empty.
    """
    _check_mask(mask, name="mask")
    components, num_components = label(mask, generate_binary_structure(mask.ndim, mask.ndim))
    if num_components <= 1:
        return mask.copy()
    sizes = np.bincount(components.ravel())
    largest: Mask = components == 1 + int(np.argmax(sizes[1:]))
    return largest


def precision_recall(predicted: Mask, truth: Mask) -> tuple[float | None, float | None]:
    """Precision and recall over all voxels of two boolean arrays of one shape.

    Precision is None where nothing is predicted, recall is None where nothing is true.
    """
    check_masks(predicted, truth)
    hits, num_predicted, num_true = _voxel_counts(predicted, truth)
    precision = hits / num_predicted if num_predicted else None
    recall = hits / num_true if num_true else None
    return precision, recall


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Probability that a positive outscores a negative, a tie counting half; None for one class.

    `scores` are finite numbers and `labels` booleans of the same shape, such as a classifier's
    probability and the label of each slice.
    """
    score_values = np.asarray(scores, dtype=np.float64)
    is_positive = np.asarray(labels)
    _check_mask(is_positive, name="labels")
    if score_values.shape != is_positive.shape:
        raise ValueError(
            f"scores and labels must have one shape, got {score_values.shape} and "
            f"{is_positive.shape}; pass one score per label"
        )
    if not np.isfinite(score_values).all():
        raise ValueError("scores must be finite, got NaN or infinity; find the sample that made it")
    num_positive = int(np.count_nonzero(is_positive))
    num_negative = is_positive.size - num_positive
    if not num_positive or not num_negative:
        return None
    ranks = rankdata(score_values.ravel())
    rank_sum = float(ranks[is_positive.ravel()].sum())
    # Mann-Whitney U over the number of positive-negative pairs
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def check_masks(prediction: Mask, truth: Mask, *, num_dimensions: int | None = None) -> None:
    """Raise ValueError unless both are boolean, of one shape, and hold at least one voxel."""
    _check_mask(prediction, name="prediction")
    _check_mask(truth, name="truth")
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth must have one shape, got {prediction.shape} and {truth.shape}; "
            "bring the prediction back to the grid of the truth"
        )
    if num_dimensions is not None and truth.ndim != num_dimensions:
        raise ValueError(
            f"masks must be (x, y, slices), got shape {truth.shape}; "
            "stack the slices of a patient on the last axis"
        )


def _outcome(num_predicted: int, num_true: int) -> Outcome:
    if num_predicted and num_true:
        return "overlap"
    if num_true:
        return "miss"
    return "false_alarm" if num_predicted else "true_negative"


def _voxel_counts(prediction: Mask, truth: Mask) -> tuple[int, int, int]:
    """Number of voxels in both masks, in the prediction, in the truth."""
    return (
        int(np.count_nonzero(prediction & truth)),
        int(np.count_nonzero(prediction)),
        int(np.count_nonzero(truth)),
    )


def _dice_and_iou(intersection: int, num_predicted: int, num_true: int) -> tuple[float, float]:
    total = num_predicted + num_true
    return 2 * intersection / total, intersection / (total - intersection)


def _surface_distances(
    first: Mask, second: Mask, spacing: tuple[float, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Distance of each surface voxel to the other surface: first to second, second to first.

    Neither mask may be empty. A tree over few surface voxels costs the same in a large volume as in
    a small one; for many a distance transform, which visits every voxel once, is faster.
    """
    box = _bounding_box(first | second)
    # outside the array counts as background
    surfaces = [mask[box] & ~binary_erosion(mask[box]) for mask in (first, second)]
    num_voxels = surfaces[0].size
    if sum(np.count_nonzero(surface) for surface in surfaces) * VOXELS_PER_QUERY < num_voxels:
        return _by_tree(surfaces[0], surfaces[1], spacing)
    return _by_transform(surfaces[0], surfaces[1], spacing)


def _by_tree(
    first: Mask, second: Mask, spacing: tuple[float, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [np.argwhere(surface) * np.asarray(spacing) for surface in (first, second)]
    return (
        np.asarray(KDTree(points[1]).query(points[0])[0], dtype=np.float64),
        np.asarray(KDTree(points[0]).query(points[1])[0], dtype=np.float64),
    )


def _by_transform(
    first: Mask, second: Mask, spacing: tuple[float, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return (
        distance_transform_edt(~second, sampling=spacing)[first],
        distance_transform_edt(~first, sampling=spacing)[second],
    )


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty."""
    box = []
    for axis in range(mask.ndim):
        other_axes = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=other_axes))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _percentile_95(distances: npt.NDArray[np.float64]) -> float:
    return float(np.percentile(distances, 95))


def _diagonal(shape: tuple[int, ...], spacing: tuple[float, ...]) -> float:
    """Length of the volume's diagonal, from outer corner to outer corner."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def _checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    spacing_mm = tuple(float(length) for length in spacing)
    if len(spacing_mm) != 3 or not all(0 < length < float("inf") for length in spacing_mm):
        raise ValueError(
            f"spacing must be three positive finite lengths in mm, got {spacing_mm}; "
            "take it from the header of the volume"
        )
    return spacing_mm


def _check_mask(mask: npt.NDArray[Any], *, name: str) -> None:
    """Raise ValueError unless the array is boolean and holds at least one voxel."""
    if mask.dtype != np.bool_:
        raise ValueError(
            f"{name} must be a boolean NumPy array, got {mask.dtype}; threshold it first, such as "
            f"{name} > 0"
        )
    if mask.size == 0:
        raise ValueError(f"{name} must hold at least one voxel, got shape {mask.shape}; pass data")
