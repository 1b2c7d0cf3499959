"""The body in a scan, as a mask: the rest is air, which is set to -1 and never learnt from."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cldf_dist.config import Data

Mask = npt.NDArray[np.bool_]

BODY_LEVEL = 0.2  # of the bright tissue: above the air's noise, below every soft tissue
SMOOTH_PIXELS = 1.0  # standard deviation, before the body is separated from air
MAY_TOUCH = 0.02  # fraction of the outermost voxels that a skull-stripped brain may reach
BODY_HOUNSFIELD = -500.0  # half way from air to water: lungs are filled afterwards


# what "auto" means where the data set says so: skull-stripped scans, and scans with air around
USUAL_RULES = {"brats": "nonzero", "chaos": "tissue", "phantom": "tissue"}


def body_mask_rule(settings: Data) -> str:
    """The rule for `body_mask_of`: `data.subject`, or for "auto" the usual one of the data set."""
    if settings.subject != "auto":
        return settings.subject
    return USUAL_RULES.get(settings.dataset, "auto")


def body_mask_of(image: npt.NDArray[Any], rule: str, *, hounsfield: bool = False) -> Mask:
    """The body in (channels, x, y, slices) as (x, y, slices), by the rule `data.subject`.

    "nonzero" where any channel is not 0; "tissue" the largest part that is not dark; "auto" the
    first where the scan's outermost voxels are all but 0 (skull-stripped), else the second.
    """
    if rule == "nonzero" or (rule == "auto" and not hounsfield and _has_empty_border(image)):
        return np.asarray((image != 0).any(axis=0))
    return dense_body_mask(image) if hounsfield else bright_body_mask(image)


def bright_body_mask(image: npt.NDArray[Any]) -> Mask:
    """The body in an MR scan whose air is not zero: (channels, x, y, slices) to (x, y, slices).

    The largest connected part where the smoothed mean of the channels is not dark, holes within
    a slice filled.
    """
    bright = np.percentile(image, 99, axis=(1, 2, 3), keepdims=True)
    mean = (image / np.where(bright > 0, bright, 1)).mean(axis=0)
    return _largest_filled(ndimage.gaussian_filter(mean, SMOOTH_PIXELS) > BODY_LEVEL)


def dense_body_mask(image: npt.NDArray[Any]) -> Mask:
    """The body in a CT, (1, x, y, slices) in Hounsfield units; the table is left out where it does
    not touch."""
    mean = image.astype(np.float32).mean(axis=0)
    dense = ndimage.gaussian_filter(mean, (SMOOTH_PIXELS, SMOOTH_PIXELS, 0)) > BODY_HOUNSFIELD
    return _largest_filled(dense)


def _largest_filled(inside: Mask) -> Mask:
    parts, num_parts = ndimage.label(inside)
    if num_parts > 1:
        inside = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    filled = [ndimage.binary_fill_holes(inside[:, :, z]) for z in range(inside.shape[2])]
    return np.stack(filled, axis=2)


def _has_empty_border(image: npt.NDArray[Any]) -> bool:
    sides = (image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1])
    filled = sum(int(np.count_nonzero(side)) for side in sides)
    return filled <= MAY_TOUCH * sum(side.size for side in sides)
