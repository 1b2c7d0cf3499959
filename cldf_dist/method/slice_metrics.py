"""Scores of single slices by the rules of the published CDM code, for comparison with papers only.

The rules were read in `xhu248/cond_ddpm_wsss`: scripts/image_p_seg.py, utils/metrics.py,
utils/postprocess.py; docs/method.md lists them, with the bias of each. None is a clinical measure;
`metrics.score_case` is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, label

from cldf_dist.method.metrics import check_masks

Mask = npt.NDArray[np.bool_]

SMOOTHING = 1e-5  # theirs; it makes Dice and IoU of two empty masks 1


@dataclass(frozen=True)
class SliceScore:
    """One slice; both distances are in pixels, not in mm, and 0 where a mask is empty.

    `hd95_pixels` is computed as in the published code, which passes MedPy a batch of one slice. In
    an array one slice thick every pixel is surface, so the percentile is over all pixels of both
    masks, with distance 0 for common pixels. `hd95_contour_pixels` is MedPy's HD95 of the 2-D
    slice, over the contours alone, the usual definition.
    """

    dice: float
    iou: float
    hd95_pixels: float
    hd95_contour_pixels: float


def slice_score(prediction: Mask, truth: Mask) -> SliceScore:
    """Score one slice; both masks are boolean, (x, y).

    Dice = (2I + s) / (P + T + s) and IoU = (I + s) / (P + T - I + s) with s = 1e-5: an empty
    prediction has Dice and IoU of nearly 0, and distance 0, the best possible.
    Raises ValueError for masks that are not boolean, empty arrays or of unequal shape.
    """
    check_masks(prediction, truth)
    common = int(np.count_nonzero(prediction & truth))
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    all_pixels, contours = _hd95(prediction, truth)
    return SliceScore(
        dice=(2 * common + SMOOTHING) / (total + SMOOTHING),
        iou=(common + SMOOTHING) / (total - common + SMOOTHING),
        hd95_pixels=all_pixels,
        hd95_contour_pixels=contours,
    )


def largest_components(mask: Mask) -> Mask:
    """Keep the largest connected component; of several equally large ones, all.

    Pixels are connected by their sides, not by corners: unlike `metrics.largest_component`, which
    joins corners and keeps one.
    """
    components, num_components = label(mask)
    if num_components <= 1:
        return mask.copy()
    sizes = np.bincount(components.ravel())
    sizes[0] = 0  # the background
    kept: Mask = (sizes == sizes.max())[components]
    return kept


def _hd95(prediction: Mask, truth: Mask) -> tuple[float, float]:
    """95th percentile over both directions together: of all pixels, and of the contours."""
    if not prediction.any() or not truth.any():
        return 0.0, 0.0
    (box,) = find_objects((prediction | truth).astype(np.int8))
    prediction, truth = prediction[box], truth[box]
    contours = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    to_prediction, to_truth = (distance_transform_edt(~contour) for contour in contours)
    num_common = int(np.count_nonzero(prediction & truth))
    # the pixel of a mask that is nearest to one outside it lies on its contour
    of_pixels = (
        to_truth[prediction & ~truth],
        to_prediction[truth & ~prediction],
        np.zeros(2 * num_common),
    )
    of_contours = (to_truth[contours[0]], to_prediction[contours[1]])
    return _percentile_95(of_pixels), _percentile_95(of_contours)


def _percentile_95(distances: Sequence[npt.NDArray[np.float64]]) -> float:
    return float(np.percentile(np.concatenate(distances), 95))
