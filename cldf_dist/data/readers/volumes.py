"""A patient's scans, a channel each, as one volume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import Affine, Volume, check_same_grid, stack_channels
from cldf_dist.data.readers.body_mask import body_mask_of, body_mask_rule

Scan = tuple[npt.NDArray[Any], Affine]  # (x, y, slices), and (4, 4) from voxel index to mm


def volume_of_scans(
    patient: str,
    scans: Sequence[Scan],
    sources: Sequence[str | Path],
    settings: Data,
    *,
    hounsfield: bool = False,
) -> Volume:
    """The scans as channels of a volume without a mask; `sources` are where each was read.

    Raises ValueError, with both sources, for scans that are not on one grid.
    """
    first = Path(sources[0])
    for source, scan in zip(sources[1:], scans[1:], strict=True):
        check_same_grid(first, scans[0], Path(source), scan)
    image = stack_channels([array for array, _ in scans])
    return Volume(
        patient=patient,
        image=image,
        body_mask=body_mask_of(image, body_mask_rule(settings), hounsfield=hounsfield),
        mask=None,
        affine=scans[0][1],
        sources=tuple(str(source) for source in sources),
        hounsfield=hounsfield,
    )
