"""The native data sets by name: who is in them, and one patient as a Volume."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cldf_dist.config import Data
from cldf_dist.data import brats
from cldf_dist.data.nifti import Volume
from cldf_dist.data.phantom import CHANNELS as PHANTOM_CHANNELS
from cldf_dist.data.phantom import PhantomSettings, phantom_patient
from cldf_dist.data.slices import slice_key

CHANNELS = {"brats": brats.CHANNELS, "phantom": PHANTOM_CHANNELS}
SUBJECT_LEVEL = 0.2  # of the bright tissue: above the air's noise, below every soft tissue
SMOOTH_PIXELS = 1.0  # standard deviation, before the subject is told from air
FAULTS_SHOWN = 5  # of a folder, in one error


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    _check_known(settings)
    return CHANNELS[settings.dataset]


def patients(settings: Data) -> list[str]:
    """Names of all patients of the data set, sorted."""
    _check_known(settings)
    if settings.dataset == "phantom":
        return [_phantom_name(index) for index in range(settings.phantom.num_patients)]
    return brats.brats_patients(_root(settings))


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient, with the mask where there is one."""
    _check_known(settings)
    if settings.dataset == "phantom":
        return _read_phantom(settings, patient)
    return brats.read_brats(_root(settings), patient)


def source_fingerprint(settings: Data, patient: str) -> str:
    """A digest that changes where the patient's source does: its folder, or a file's name, size or
    time of change; for the phantom its settings. No file is opened."""
    _check_known(settings)
    source: list[Any]
    if settings.dataset == "phantom":
        source = [patient, dataclasses.asdict(settings.phantom)]
    else:
        folder = Path(_root(settings)).resolve() / patient
        found = [(file.name, file.stat()) for file in brats.patient_files(folder)]
        source = [str(folder), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def check_listing(settings: Data, names: Sequence[str]) -> None:
    """Raise ValueError, with the first faults and their number, for all that names and file
    listings give away: patient names that cannot be keys, missing and doubled scans."""
    faults = []
    for name in names:
        try:
            slice_key(name, 0)
        except ValueError as error:
            faults.append(str(error))
        if settings.dataset != "phantom":
            faults += brats.listing_faults(Path(_root(settings)) / name)
    if faults:
        shown = "; ".join(faults[:FAULTS_SHOWN])
        more = len(faults) - FAULTS_SHOWN
        raise ValueError(
            f"the data has {len(faults)} faults: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def new_scans(settings: Data, path: str | Path) -> list[Path]:
    """The scan folders at `path`: itself, or those in it; for scans that come without a mask."""
    _check_known(settings)
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"input={path} is not a folder; expected {brats.LAYOUT}")
    if brats.is_patient_folder(path):
        return [path]
    return [path / name for name in brats.brats_patients(path)]


def read_scan(settings: Data, path: Path) -> Volume:
    """One new scan, laid out like a BraTS patient; a segmentation beside it is not opened."""
    volume = brats.read_scan(path, with_mask=False)
    if settings.dataset == "phantom":  # its air is not zero
        return dataclasses.replace(volume, foreground=subject_mask(volume.image))
    return volume


def subject_mask(image: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """The subject in a scan whose air is not zero: (channels, x, y, slices) to (x, y, slices).

    The largest connected part where the smoothed mean of the channels is not dark, holes within
    a slice filled.
    """
    bright = np.percentile(image, 99, axis=(1, 2, 3), keepdims=True)
    mean = (image / np.maximum(bright, 1)).mean(axis=0)
    inside = ndimage.gaussian_filter(mean, SMOOTH_PIXELS) > SUBJECT_LEVEL
    parts, num_parts = ndimage.label(inside)
    if num_parts > 1:
        inside = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    filled = [ndimage.binary_fill_holes(inside[:, :, z]) for z in range(inside.shape[2])]
    return np.stack(filled, axis=2)


def _check_known(settings: Data) -> None:
    if settings.dataset not in CHANNELS:
        known = ", ".join(sorted(CHANNELS))
        raise ValueError(f"data.dataset must be one of {known}; got {settings.dataset!r}")


def _root(settings: Data) -> str:
    if not settings.root:
        raise ValueError(
            f"data.root is empty; set it to the folder of the {settings.dataset} patients"
        )
    return settings.root


def _phantom_name(index: int) -> str:
    return f"phantom_{index:03d}"


def _read_phantom(settings: Data, patient: str) -> Volume:
    names = [_phantom_name(index) for index in range(settings.phantom.num_patients)]
    if patient not in names:
        raise ValueError(f"the phantom has patients {names[0]} to {names[-1]}; got {patient!r}")
    phantom = settings.phantom
    image, mask, affine = phantom_patient(
        names.index(patient),
        PhantomSettings(
            num_patients=phantom.num_patients,
            num_slices=phantom.num_slices,
            grid_size=phantom.grid_size,
            seed=phantom.seed,
        ),
    )
    return Volume(patient, image, subject_mask(image), mask > 0, affine)
