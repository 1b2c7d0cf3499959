"""Linear interpolation along one axis, as torch's `interpolate` without `align_corners` does it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def linear_neighbours(
    positions: Positions, *, target: int, source: int
) -> tuple[Positions, Positions, npt.NDArray[np.float32]]:
    """The two source pixels around each target pixel, and the weight of the second.

    `positions` (n,) are pixels of an axis of `target` pixels, which an axis of `source` pixels is
    resampled to. Centres of pixels lie at halves; beyond the outermost centres the outermost pixel
    counts alone.
    """
    place = np.clip((positions + 0.5) * (source / target) - 0.5, 0, source - 1)
    lower = np.floor(place).astype(np.int64)
    return lower, np.minimum(lower + 1, source - 1), (place - lower).astype(np.float32)
