"""The mask files of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cldf_dist.data.formats.nifti import read_nifti
from cldf_dist.scoring.masks import Mask

# threshold rules with a line per patient in cases.csv; the last is for `oracle_intensity` alone
HEADLINE, OTSU, ORACLE = "headline", "otsu", "oracle"


def truth_path(prepare: Path, patient: str) -> Path:
    """The path at which `prepare` keeps a test patient's true mask, if there is one."""
    return prepare / "truth" / f"{patient}.nii.gz"


def mask_path(segment: Path, method: str, patient: str) -> Path:
    """The path of the mask that `segment` wrote by the headline rule."""
    return segment / "masks" / method / f"{patient}.nii.gz"


def read_mask(path: Path) -> Mask:
    """A mask file as booleans (x, y, slices)."""
    return np.asarray(read_nifti(path)[0] > 0)
