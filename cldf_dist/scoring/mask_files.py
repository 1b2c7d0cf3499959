"""The mask files of a run, and the orientation of the volumes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cldf_dist.data.formats.nifti import read_nifti
from cldf_dist.data.slices import ORIENTATION, Geometry
from cldf_dist.scoring.masks import Mask


def truth_path(prepare: Path, patient: str) -> Path:
    """The path at which `prepare` keeps a test patient's true mask, if there is one."""
    return prepare / "truth" / f"{patient}.nii.gz"


def mask_path(segment: Path, method: str, patient: str) -> Path:
    """The path of the mask that `segment` wrote by the headline rule."""
    return segment / "masks" / method / f"{patient}.nii.gz"


def read_mask(path: Path) -> Mask:
    """A mask file as booleans (x, y, slices)."""
    return np.asarray(read_nifti(path)[0] > 0)


def to_lps(volume: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
    """A volume (x, y, slices) in its file's orientation, turned to LPS, in which slices have the
    numbers of their keys."""
    return np.asarray(nib.orientations.apply_orientation(volume, lps_transform(geometry)))


def lps_transform(geometry: Geometry) -> npt.NDArray[Any]:
    """Nibabel's transform (3, 2) from the file's orientation to LPS: target axis, direction."""
    codes = nib.orientations.axcodes2ornt
    return np.asarray(nib.orientations.ornt_transform(codes(geometry.axes), codes(ORIENTATION)))
