"""DICOM: the slices of one series, a file each, put together to a volume in space.

highdicom's `get_volume_from_series` (0.28) is not used: it accepts planes that lean by 2 degrees,
a lone slice of unknown thickness and a slope of 0, its errors name no file, and it takes longer
and more memory.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.data.formats.dicom_slice import (
    ORIENTATION_TOLERANCE,
    Header,
    Vector,
    has_magic,
    read_header,
    read_pixels,
    read_series_key,
)
from cldf_dist.data.formats.listing import is_visible, natural_order
from cldf_dist.data.formats.nifti import Affine

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Positions are decimal strings that scanners round: by this share of a step or these mm, whichever
# is more, the steps between slices may differ.
STEP_TOLERANCE, STEP_TOLERANCE_MM = 0.02, 0.05
SAME_PLACE_MM = 1e-3
DRIFT_TOLERANCE_PIXELS = 0.5  # of slices within their plane: what our affine cannot express
SPACING_TOLERANCE_MM = 1e-4


@dataclass(frozen=True)
class Series:
    """One scan, its slices ascending along their normal; nothing about the patient."""

    image: npt.NDArray[Any]  # (x, y, slices) = (columns, rows, slices), rescaled; int16 or float32
    affine: Affine  # (4, 4), voxel index to mm, RAS+ as in NIfTI
    files: tuple[Path, ...]  # one per slice, in the order of the slices
    modality: str  # "CT", "MR" and so on
    echo_time: float | None  # ms
    field_strength: float | None  # T

    @property
    def folder(self) -> Path:
        """The folder of the first file."""
        return self.files[0].parent


def dicom_files(folder: str | Path) -> list[Path]:
    """The DICOM files directly in `folder`, numbers in their names in numerical order.

    A file counts by its first 132 bytes or by the ending `.dcm`; hidden files and DICOMDIR do not.
    Raises FileNotFoundError where `folder` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected the DICOM files of one series")
    return sorted(filter(_is_dicom, folder.iterdir()), key=natural_order)


def dicom_folders(top: Path) -> Iterator[list[Path]]:
    """The DICOM files of each folder at or below `top` that holds some, in the order of names."""
    for folder, names, _ in os.walk(top):
        names[:] = sorted(name for name in names if is_visible(Path(name)))
        files = dicom_files(folder)
        if files:
            yield files


def group_series(files: Iterable[str | Path]) -> dict[tuple[str, float | None], list[Path]]:
    """Files by SeriesInstanceUID and echo time in ms, in the order given; no pixels are read."""
    groups: dict[tuple[str, float | None], list[Path]] = defaultdict(list)
    for file in map(Path, files):
        groups[read_series_key(file)].append(file)
    return dict(groups)


def read_series(files: Sequence[str | Path], *, name: str) -> Series:
    """The volume that the files of one series make up; `name` is what errors call it.

    The order of the files does not matter: slices are sorted by their positions along their normal.
    Each slice's own RescaleSlope and RescaleIntercept are applied. Raises FileNotFoundError for no
    or missing files, ValueError where the slices are no regular grid or cannot be decoded.
    """
    if not files:
        raise FileNotFoundError(f"{name} has no DICOM files; expected one file per slice")
    slices = [read_header(Path(file)) for file in files]
    _check_one_series(slices, name)
    _check_same_grid(slices)
    first_normal = np.cross(*slices[0].orientation)
    normal = first_normal / np.linalg.norm(first_normal)
    slices.sort(key=lambda item: float(item.position @ normal))
    step = _step(slices, normal, name)
    _check_no_drift(slices, normal)
    planes = [read_pixels(item) for item in slices]
    dtype = np.int16 if all(plane.dtype == np.int16 for plane in planes) else np.float32
    return Series(
        image=np.stack(planes, dtype=dtype).T,
        affine=_affine(slices[0], normal * step),
        files=tuple(item.file for item in slices),
        modality=slices[0].modality,
        echo_time=slices[0].echo_time,
        field_strength=slices[0].field_strength,
    )


def _is_dicom(file: Path) -> bool:
    if not is_visible(file) or file.stem.upper() == "DICOMDIR" or not file.is_file():
        return False
    return file.suffix.lower() == ".dcm" or has_magic(file)


def _check_one_series(slices: list[Header], name: str) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for item in slices:
        groups[item.series].append(item.file.name)
    if len(groups) > 1:
        some = ", ".join(f"{names[0]} ({len(names)})" for names in list(groups.values())[:5])
        raise ValueError(
            f"{name} holds {len(groups)} series, must be one; a file of each, with the number of "
            f"files: {some}; keep one folder per series"
        )


def _check_same_grid(slices: list[Header]) -> None:
    first = slices[0]
    for item in slices[1:]:
        for what, one, other, tolerance in (
            ("rows and columns", np.array(first.shape), np.array(item.shape), 0.0),
            ("PixelSpacing", first.pixel_spacing, item.pixel_spacing, SPACING_TOLERANCE_MM),
            ("orientation", first.orientation, item.orientation, ORIENTATION_TOLERANCE),
        ):
            if np.abs(one - other).max() > tolerance:
                raise ValueError(
                    f"{first.file} and {item.file.name} must have the same {what}, got "
                    f"{one.ravel().tolist()} and {other.ravel().tolist()}; "
                    "keep localizers and reformats in other folders"
                )


def _step(slices: list[Header], normal: Vector, name: str) -> float:
    """Distance in mm from slice to slice; raises unless the sorted slices are equally spaced."""
    if len(slices) == 1:
        return _lone_step(slices[0], name)
    places = [float(item.position @ normal) for item in slices]
    gaps = np.diff(places)
    if gaps.min() < SAME_PLACE_MM:
        one, other = slices[int(gaps.argmin())], slices[int(gaps.argmin()) + 1]
        echoes = one.echo_time != other.echo_time
        remedy = "keep one folder per echo" if echoes else "remove the one that is not wanted"
        raise ValueError(f"{one.file} and {other.file.name} are slices of one place; {remedy}")
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    tolerance = max(STEP_TOLERANCE * usual, STEP_TOLERANCE_MM)
    for gap, (one, other) in zip(gaps.tolist(), pairwise(slices), strict=True):
        if abs(gap - usual) <= tolerance:
            continue
        fault = (
            f"slices must be equally spaced, to within {tolerance:.3f} mm; "
            "resample the scan to an even grid or leave it out"
        )
        steps = round(gap / usual)
        if steps > 1 and abs(gap - steps * usual) <= steps * tolerance:
            missing = "1 slice is" if steps == 2 else f"{steps - 1} slices are"
            fault = f"{missing} missing; fetch the whole series"
        raise ValueError(
            f"{name}: {one.file.name} and {other.file.name} are {gap:.3f} mm apart, "
            f"usual are {usual:.3f}: {fault}"
        )
    return (places[-1] - places[0]) / len(gaps)


def _lone_step(only: Header, name: str) -> float:
    if only.thickness is None or only.thickness <= 0:
        raise ValueError(
            f"{only.file} is the only slice of {name} and must have SpacingBetweenSlices or "
            f"SliceThickness > 0, got {only.thickness}; fetch the whole series"
        )
    return only.thickness


def _check_no_drift(slices: list[Header], normal: Vector) -> None:
    """Raise for a sheared stack, as a tilted gantry leaves it."""
    offsets = np.stack([item.position - slices[0].position for item in slices])
    drift = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    limit = DRIFT_TOLERANCE_PIXELS * float(slices[0].pixel_spacing.min())
    worst = int(drift.argmax())
    if drift[worst] > limit:
        raise ValueError(
            f"{slices[worst].file} lies {drift[worst]:.2f} mm beside {slices[0].file.name} within "
            f"the plane of the slices, at most {limit:.2f} are allowed: a tilted gantry or a "
            "sheared stack; resample it to a straight grid (dcm2niix does) and read the NIfTI file"
        )


def _affine(first: Header, step: Vector) -> Affine:
    """PS3.3, C.7.6.2.1.1, for (column, row, slice), turned from LPS to RAS."""
    lps = np.eye(4)
    lps[:3, 0] = first.orientation[0] * first.pixel_spacing[1]
    lps[:3, 1] = first.orientation[1] * first.pixel_spacing[0]
    lps[:3, 2] = step
    lps[:3, 3] = first.position
    return np.asarray(LPS_TO_RAS @ lps)
