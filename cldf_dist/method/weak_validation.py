"""Agreement of score maps with slice labels, by which settings may be chosen without a mask.

Neither number sees a mask. They say whether the pixels above a threshold lie on the right slices,
not whether they lie at the right place within them: a necessary condition, not an estimate of Dice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cldf_dist.labels import SliceLabel
from cldf_dist.method.metrics import auroc

Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


def area_fractions(scores: Scores, subject: Mask, threshold: float) -> npt.NDArray[np.float64]:
    """Share of each slice's subject above `threshold` (slices,), from (slices, height, width).

    A slice without a subject has the share 0.
    """
    above = ((scores > threshold) & subject).sum((1, 2))
    return np.asarray(above / np.maximum(subject.sum((1, 2)), 1), dtype=np.float64)


def weak_validation(
    shares: npt.NDArray[np.float64], labels: Labels
) -> dict[str, float | int | None]:
    """`area_auroc`: how often a positive slice has the larger share than a negative one, ties
    counted half; `false_area`: the mean share of negative slices; `num_slices` that count.

    `labels` (slices,) are those of `data.slices`; only 1 and 0 count. What has no slices is None.
    Raises ValueError where the lengths differ.
    """
    if shares.shape != labels.shape:
        raise ValueError(
            f"shares and labels must be one number per slice, got {shares.shape} and {labels.shape}"
        )
    known = labels >= 0
    negative = shares[labels == SliceLabel.NEGATIVE]
    return {
        "area_auroc": auroc(shares[known], labels[known] == SliceLabel.POSITIVE),
        "false_area": float(negative.mean()) if negative.size else None,
        "num_slices": int(known.sum()),
    }
