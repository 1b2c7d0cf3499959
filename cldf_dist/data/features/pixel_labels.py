"""The pixel labels of training slices, read one slice at a time and never held for all.

100,000 slices of 240 x 240 are 5.8 GB of labels, for every process and each of its workers. Only
the number of pixels of each label is kept of a slice.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from cldf_dist.labels import PixelLabel

Labels = npt.NDArray[np.int8]
Numbers = npt.NDArray[np.int64]


class PixelLabels(Protocol):
    """The interface of a source of pixel labels; it must be picklable for the loader's workers."""

    def labels(self, slice_index: int) -> Labels:
        """The `PixelLabel`s (height, width) of one slice of the cache, read-only."""
        ...


def count_labels(source: PixelLabels, slice_indices: Numbers) -> Numbers:
    """The number of background and object pixels of each of these slices, (slices, 2)."""
    counts = np.zeros((len(slice_indices), 2), np.int64)
    for place, slice_index in enumerate(slice_indices):
        labels = source.labels(int(slice_index))
        for label in (PixelLabel.BACKGROUND, PixelLabel.OBJECT):
            counts[place, label] = np.count_nonzero(labels == label)
    return counts
