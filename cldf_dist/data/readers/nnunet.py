"""Data sets in the layout of nnU-Net: `dataset.json`, `imagesTr` and `labelsTr`.

Layout: `<root>/imagesTr/<case>_0000.nii.gz`, `<case>_0001.nii.gz` and so on, one file per channel,
all on one grid, and `<root>/labelsTr/<case>.nii.gz`, which a case may lack. With a CSV file of
labels (`data.labels`) labelsTr may be missing altogether; where both exist, the file says what is
trained on, and the masks serve the evaluation alone. Other folders, imagesTs among them, are not
read. `dataset.json` is read in both versions of the format: `channel_names`, labels by name and
regions (version 2), or `modality` and labels by number (version 1).

A case counts as a patient. Where one person has several cases, `data.splits` must keep them in one
split.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Data
from cldf_dist.data.formats.label_table import axis_to_head, read_labels
from cldf_dist.data.formats.listing import NIFTI_ENDINGS, first_faults, nifti_files
from cldf_dist.data.formats.nifti import Volume, check_same_grid, read_nifti
from cldf_dist.data.readers.objects import mask_of_labels, object_names
from cldf_dist.data.readers.volumes import Scan, volume_of_scans

IMAGES, MASKS, DESCRIPTION = "imagesTr", "labelsTr", "dataset.json"
LAYOUT = f"<root>/{DESCRIPTION}, <root>/{IMAGES}/<case>_0000.nii.gz, <root>/{MASKS}/<case>.nii.gz"
BACKGROUND, IGNORE = "background", "ignore"
CASE_AND_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Description:
    """The content of `dataset.json`."""

    path: Path
    channels: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]  # name -> values in the masks, without the background
    ending: str  # of every file


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    return read_description(settings.root).channels


def objects(settings: Data) -> tuple[str, ...]:
    """The names that `data.object` may be."""
    if settings.labels:
        return read_labels(settings.labels).objects
    return tuple(read_description(settings.root).labels)


def patients(settings: Data) -> list[str]:
    """Sorted names of the cases.

    Raises ValueError for what concerns the data set as a whole: files that belong to no case, masks
    without images, an object that is not there, rows of labels that name no case.
    """
    root, description = Path(settings.root), read_description(settings.root)
    _object_names(settings, description)
    found, faults = _cases(root, description)
    if not found and not faults:
        raise ValueError(
            f"{root / IMAGES} holds no image ending in {description.ending}; expected {LAYOUT}"
        )
    if (root / MASKS).is_dir():
        faults += _stray_masks(root / MASKS, found, description.ending)
    elif not settings.labels:
        raise FileNotFoundError(
            f"{root} has neither {MASKS} nor a file of labels; expected {LAYOUT}, or add "
            "data.labels=FILE.csv"
        )
    if faults:
        raise ValueError(first_faults(faults))
    if settings.labels:
        read_labels(settings.labels).check_patients(found)
    return sorted(found)


def patient_files(settings: Data, patient: str) -> list[Path]:
    """The files that a case is made from, the description and the labels among them."""
    description = read_description(settings.root)
    mask = _mask_path(settings, patient, description)
    files = [*_image_paths(settings, patient, description), mask]
    labels = [Path(settings.labels)] if settings.labels else []
    return [description.path, *labels, *(file for file in files if file.is_file())]


def listing_faults(settings: Data, patient: str) -> list[str]:
    """The faults of a case's file names, a sentence each; no image is opened."""
    description = read_description(settings.root)
    return [
        f"{path} is missing: every case needs a file for each of {', '.join(description.channels)}"
        for path in _image_paths(settings, patient, description)
        if not path.is_file()
    ]


def read_patient(settings: Data, patient: str) -> Volume:
    """One case, with its mask and its row of the labels where there are such."""
    description = read_description(settings.root)
    paths = _image_paths(settings, patient, description)
    scans = [read_nifti(path) for path in paths]
    hounsfield = all(name.upper() == "CT" for name in description.channels)
    volume = volume_of_scans(patient, scans, paths, settings, hounsfield=hounsfield)
    slice_labels = None
    if settings.labels:
        num_slices = scans[0][0].shape[axis_to_head(volume.affine)]
        table = read_labels(settings.labels)
        slice_labels = table.slice_labels(patient, num_slices, settings.object)
    mask = _mask(settings, patient, description, paths[0], scans[0])
    return dataclasses.replace(volume, mask=mask, slice_labels=slice_labels)


def read_description(root: str | Path) -> Description:
    """The content of the `dataset.json` in `root`, in either version of the format.

    Raises FileNotFoundError where there is none, ValueError with the key that is wrong.
    """
    path = Path(root) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {LAYOUT}")
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; correct it there") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must be a JSON object, with channel_names, labels, file_ending")
    ending = said.get("file_ending", NIFTI_ENDINGS[0])
    if ending not in NIFTI_ENDINGS:
        raise ValueError(
            f"{path}: file_ending must be {' or '.join(NIFTI_ENDINGS)}, got {ending!r}; convert "
            "the files to NIfTI"
        )
    return Description(path, _channels(said, path), _labels(said, path), ending)


def _channels(said: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names = said.get("channel_names", said.get("modality"))
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        raise ValueError(
            f'{path}: channel_names must be like {{"0": "T1", "1": "T2"}}, numbered from 0 without '
            f"gaps, got {names!r}"
        )
    if not names:
        raise ValueError(f"{path}: channel_names must name at least one channel")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _labels(said: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    labels = said.get("labels", {})
    if not isinstance(labels, dict):
        raise ValueError(f'{path}: labels must be like {{"background": 0, "liver": 1}}')
    if all(isinstance(name, str) and key.isdecimal() for key, name in labels.items()):
        labels = {name: int(key) for key, name in labels.items()}  # version 1
    if IGNORE in labels:
        raise ValueError(
            f"{path}: the label {IGNORE!r} is not supported, what a slice shows where it lies is "
            "unknown; remove the label here and from the masks, or leave those cases out"
        )
    known = {}
    for name, value in labels.items():
        values = tuple(value) if isinstance(value, list) else (value,)
        if name == BACKGROUND or values == (0,):
            continue
        if not values or not all(type(number) is int and number > 0 for number in values):
            raise ValueError(
                f"{path}: the label {name!r} must be a whole number > 0 or a list of them, "
                f"got {value!r}"
            )
        if "+" in name or "," in name:
            raise ValueError(f"{path}: labels must have no '+' or ',' in their names, got {name!r}")
        known[name] = values
    return known


def _object_names(settings: Data, description: Description) -> tuple[str, ...]:
    """The labels that make up the object; ValueError unless labels and masks know them all."""
    has_masks = (Path(settings.root) / MASKS).is_dir()
    known = description.labels
    if not settings.labels:
        usual = next(iter(known)) if len(known) == 1 else ""
        try:
            return object_names(settings.object, known, usual=usual)
        except ValueError as error:
            raise ValueError(f"{description.path}: {error}") from error
    parts = read_labels(settings.labels).object_names(settings.object)
    unknown = [part for part in parts if part not in known]
    if has_masks and unknown:
        raise ValueError(
            f"{description.path}: labels must name {', '.join(unknown)} as {settings.labels} does, "
            f"got {', '.join(known) or 'none'}; name them alike, or move {MASKS} away"
        )
    return parts


def _image_paths(settings: Data, case: str, description: Description) -> list[Path]:
    folder, ending = Path(settings.root) / IMAGES, description.ending
    return [folder / f"{case}_{number:04d}{ending}" for number in range(len(description.channels))]


def _mask_path(settings: Data, case: str, description: Description) -> Path:
    return Path(settings.root) / MASKS / f"{case}{description.ending}"


def _mask(
    settings: Data,
    case: str,
    description: Description,
    image_path: Path,
    scan: Scan,
) -> npt.NDArray[np.bool_] | None:
    path = _mask_path(settings, case, description)
    if not path.is_file():
        return None
    parts = _object_names(settings, description)
    labels = read_nifti(path)
    check_same_grid(image_path, scan, path, labels)
    wanted = {value for part in parts for value in description.labels[part]}
    allowed = {0, *(value for values in description.labels.values() for value in values)}
    return mask_of_labels(labels[0], path, wanted=wanted, allowed=allowed)


def _cases(root: Path, description: Description) -> tuple[set[str], list[str]]:
    """The cases that have an image, and what is wrong with the names of the others."""
    folder = root / IMAGES
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected {LAYOUT}")
    last = len(description.channels) - 1
    cases, faults = set(), []
    for name in (file.name for file in nifti_files(folder)):
        stem = name.removesuffix(description.ending)
        found = CASE_AND_CHANNEL.fullmatch(stem) if name.endswith(description.ending) else None
        if found is None or int(found[2]) > last:
            faults.append(
                f"{folder / name} must be called <case>_<channel>{description.ending}, <channel> "
                f"from 0000 to {last:04d} as {DESCRIPTION} says; rename it, or split it into one "
                "file per channel"
            )
        else:
            cases.add(found[1])
    return cases, faults


def _stray_masks(folder: Path, cases: set[str], ending: str) -> list[str]:
    return [
        f"{file} belongs to no case of {IMAGES}; add the images or remove it"
        for file in nifti_files(folder)
        if file.name.removesuffix(ending) not in cases
    ]
