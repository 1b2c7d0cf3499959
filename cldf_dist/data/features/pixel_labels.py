"""A label for each pixel of a training slice, read where it is needed and never held for all.

100,000 slices of 240 x 240 are 5.8 GB of labels, for every process and each of its workers; what
is kept of a slice is how many of its pixels bear which label.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from cldf_dist.labels import PixelLabel

Labels = npt.NDArray[np.int8]
Numbers = npt.NDArray[np.int64]


class PixelLabels(Protocol):
    """Where labels come from. It travels to the loader's processes by pickle."""

    def labels(self, slice_index: int) -> Labels:
        """(height, width) of the slice in that row of the cache: 1 object, 0 background, -1
        unknown. Read-only."""
        ...


def count_labels(source: PixelLabels, slice_indices: Numbers) -> Numbers:
    """How many pixels of each row are background and object, (len(rows), 2); one at a time."""
    counts = np.zeros((len(slice_indices), 2), np.int64)
    for place, slice_index in enumerate(slice_indices):
        labels = source.labels(int(slice_index))
        for label in (PixelLabel.BACKGROUND, PixelLabel.OBJECT):
            counts[place, label] = np.count_nonzero(labels == label)
    return counts
