"""The labels of slices and of pixels: the numbers that are stored, learnt and compared."""

from enum import IntEnum


class SliceLabel(IntEnum):
    """The image-level label of a slice; a classifier's class index where it is not negative."""

    UNLABELLED = -2  # neither a mask nor a table says what it holds
    EXCLUDED = -1  # holds less of the object than `data.min_object_pixels`
    NEGATIVE = 0
    POSITIVE = 1


class PixelLabel(IntEnum):
    """The pseudo-label of a pixel that the pixel decoder learns from."""

    UNKNOWN = -1  # never learnt from
    BACKGROUND = 0
    OBJECT = 1


CLASSES = ("no object", "object")  # of a slice, by class index
UNCONDITIONAL = len(CLASSES)  # the class index that tells a diffusion model "no label given"
