"""Linear interpolation along one axis, as torch's `interpolate` without `align_corners` does it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

Positions = Int64[np.ndarray, " pixels"]


def linear_neighbours(
    positions: Positions, *, target: int, source: int
) -> tuple[Positions, Positions, Float32[np.ndarray, " pixels"]]:
    """The two source pixels around each target pixel, and the weight of the second.

    `positions` index an axis of `target` pixels, onto which an axis of `source` pixels is
    resampled. Pixel centres lie at half-integers. Beyond the outermost centres the outermost pixel
    is repeated.
    """
    place = np.clip((positions + 0.5) * (source / target) - 0.5, 0, source - 1)
    lower = np.floor(place).astype(np.int64)
    return lower, np.minimum(lower + 1, source - 1), (place - lower).astype(np.float32)
