"""The native data sets by name: who is in them, and one patient as a Volume.

A reader is a module with the functions `channels`, `objects`, `patients`, `patient_files`,
`listing_faults` and `read_patient`, each of the settings `Data` (and a patient's name).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cldf_dist.config import Data, Mark, marked
from cldf_dist.data.formats.listing import first_faults
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.slices import slice_key

READERS = {  # name -> module of this folder; DICOM is imported where it is read
    "brats": "brats",
    "chaos": "chaos",
    "dicom": "dicom_folder",
    "nnunet": "nnunet",
    "phantom": "phantom_scans",
}


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    return tuple(_reader(settings).channels(settings))


def objects(settings: Data) -> tuple[str, ...]:
    """Names of the objects that `data.object` may be."""
    return tuple(_reader(settings).objects(settings))


def patients(settings: Data) -> list[str]:
    """Names of all patients of the data set, sorted."""
    return list(_reader(settings).patients(settings))


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient, with the mask where there is one."""
    volume: Volume = _reader(settings).read_patient(settings, patient)
    return volume


def source_fingerprint(settings: Data, patient: str) -> str:
    """A digest that changes where the patient's source does: its files' names, sizes or times of
    change, or the settings by which it is read. No file is opened."""
    files = [_state(file) for file in _reader(settings).patient_files(settings, patient)]
    if settings.dataset == "phantom":
        read_by = dataclasses.asdict(settings.phantom)
    else:
        read_by = {name: getattr(settings, name) for name in marked(Data, Mark.SELECTS_SOURCE)}
    source = [patient, read_by, files]
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
        faults += _reader(settings).listing_faults(settings, name)
    if faults:
        counted = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ValueError(f"the data has {counted}: {first_faults(faults)}")


def _state(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"cannot look at {file}: {error.strerror}; a broken link? Fetch the file again"
        ) from error
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def _reader(settings: Data) -> Any:
    if settings.dataset not in READERS:
        known = ", ".join(sorted(READERS))
        raise ValueError(f"data.dataset must be one of {known}; got {settings.dataset!r}")
    if settings.dataset != "phantom" and not settings.root:
        raise ValueError(
            f"data.root is empty; set it to the folder of the {settings.dataset} patients"
        )
    return import_module(f"cldf_dist.data.readers.{READERS[settings.dataset]}")
