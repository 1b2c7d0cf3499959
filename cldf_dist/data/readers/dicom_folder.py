"""Folders of DICOM series, with a CSV file of labels.

Layout: `<root>/<patient>/` holds the files of one series, directly or in one folder at any depth,
or a sub-folder for each channel with the files of one series each. One series is a channel named
by its Modality (`ct`, `mr`); sub-folders name the channels, the same in all patients. All channels
of a patient are on one grid. `data.labels` is the file of labels (`label_table.py`); it calls a
slice by its file's name, with or without the ending or the folder, or by its SOPInstanceUID.
`<patient>/mask.nii.gz`, 1 in the object and 0 elsewhere, on the grid of the series, is optional and
serves the evaluation alone. Of the files' headers only geometry is kept; patients are called by
their folders.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cldf_dist.config import Data
from cldf_dist.data.formats.dicom import Series, dicom_files, dicom_folders, read_series
from cldf_dist.data.formats.dicom_slice import quiet, read_dataset
from cldf_dist.data.formats.label_table import LabelTable, axis_to_head, read_labels
from cldf_dist.data.formats.listing import subfolders
from cldf_dist.data.formats.nifti import Volume, check_same_grid, read_nifti
from cldf_dist.data.readers.objects import mask_of_labels
from cldf_dist.data.readers.volumes import Scan, volume_of_scans

MASKS = ("mask.nii.gz", "mask.nii")
LAYOUT = "<root>/<patient>/<file> of one series, or <root>/<patient>/<channel>/<file> of several"
CT = "CT"
SLICE_AXIS = 2  # of a series


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, sorted: those of the first patient."""
    first = next(_patient_folders(settings.root))
    return tuple(_channels(first, _series_files(first)))


def objects(settings: Data) -> tuple[str, ...]:
    """The names that `data.object` may be: the columns of the labels."""
    return _table(settings).objects


def patients(settings: Data) -> list[str]:
    """Sorted names of the folders that hold DICOM files.

    Raises ValueError for labels of an unknown object, of patients who are not there, or of several
    objects where there are masks, which are of one.
    """
    folders = list(_patient_folders(settings.root))
    table = _table(settings)
    table.object_names(settings.object)
    table.check_patients([folder.name for folder in folders])
    masks = [mask for folder in folders for mask in _masks(folder)]
    if masks and len(table.objects) > 1:
        raise ValueError(
            f"{masks[0]}: which of {', '.join(table.objects)} in {table.path} is it? "
            "Keep one column there, or move the masks away"
        )
    return [folder.name for folder in folders]


def patient_files(settings: Data, patient: str) -> list[Path]:
    """The files that a patient is made from, the labels among them."""
    folder = Path(settings.root) / patient
    series = _series_files(folder).values()
    labels = [Path(settings.labels)] if settings.labels else []
    return [*labels, *(file for files in series for file in files), *_masks(folder)]


def listing_faults(settings: Data, patient: str) -> list[str]:
    """The faults of a patient's folders, a sentence each; no pixels are read."""
    folder, faults = Path(settings.root) / patient, []
    if len(_masks(folder)) > 1:
        faults.append(f"{folder} has more than one mask: {', '.join(MASKS)}; keep one")
    try:
        _check_channels(settings, folder, _series_files(folder))
    except ValueError as error:
        faults.append(str(error))
    return faults


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient, with the mask and the labels where there are such; channels sorted by name."""
    folder = Path(settings.root) / patient
    files = _series_files(folder)
    _check_channels(settings, folder, files)
    series = [read_series(found, name=str(folder / name)) for name, found in files.items()]
    sources = [folder / name for name in files]
    scans = [(item.image, item.affine) for item in series]
    hounsfield = all(item.modality == CT for item in series)
    volume = volume_of_scans(patient, scans, sources, settings, hounsfield=hounsfield)
    return dataclasses.replace(
        volume,
        mask=_mask(folder, sources[0], scans[0]),
        slice_labels=_slice_labels(settings, folder, series) if settings.labels else None,
        dicom_files=series[0].files,
    )


def _table(settings: Data) -> LabelTable:
    if not settings.labels:
        raise ValueError("data.labels must name the CSV file of labels for data.dataset=dicom")
    return read_labels(settings.labels)


def _patient_folders(root: str | Path) -> Iterator[Path]:
    """Sorted, at least one; folders without DICOM files do not count."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root is not a folder: {root}; expected {LAYOUT}")
    folders = (folder for folder in subfolders(root) if any(dicom_folders(folder)))
    first = next(folders, None)
    if first is None:
        raise ValueError(f"{root} holds no folders with DICOM files; expected {LAYOUT}")
    yield first
    yield from folders


def _series_files(folder: Path) -> dict[str, list[Path]]:
    """DICOM files by sub-folder, sorted by its name; those of a single series under "" alone."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected {LAYOUT}")
    below = {item.name: list(chain(*dicom_folders(item))) for item in subfolders(folder)}
    found = {name: files for name, files in below.items() if files}
    own = dicom_files(folder)
    if own or len(found) < 2:
        return {"": [*own, *(file for files in found.values() for file in files)]}
    return found


def _channels(folder: Path, files: dict[str, list[Path]]) -> list[str]:
    """The names of the channels; a single series is named by its Modality."""
    if "" not in files:
        return list(files)
    if not files[""]:
        raise ValueError(f"{folder} holds no DICOM files; expected {LAYOUT}")
    modality = _element(files[""][0], "Modality")
    if not modality:
        raise ValueError(f"{files[''][0]}: Modality is missing; it names the channel")
    return [modality.lower()]


def _check_channels(settings: Data, folder: Path, files: dict[str, list[Path]]) -> None:
    """Raise ValueError unless the patient has the channels of the first one."""
    expected, found = channels(settings), _channels(folder, files)
    if tuple(found) != expected:
        raise ValueError(
            f"{folder} has the channels {', '.join(found)}, other patients have "
            f"{', '.join(expected)}; every patient needs the same sub-folders, one series in each"
        )


def _element(file: Path, keyword: str) -> str:
    """An element of a file's header as text, empty where it is missing."""
    with quiet():
        return str(read_dataset(file, [keyword]).get(keyword) or "")


def _masks(folder: Path) -> list[Path]:
    return [folder / name for name in MASKS if (folder / name).is_file()]


def _mask(folder: Path, source: Path, scan: Scan) -> npt.NDArray[np.bool_] | None:
    """The mask on the grid of the series, whichever way its own axes run."""
    found = _masks(folder)
    if not found:
        return None
    labels, affine = read_nifti(found[0])
    orientation = nib.orientations.io_orientation
    turn = nib.orientations.ornt_transform(orientation(affine), orientation(scan[1]))
    turned = nib.orientations.apply_orientation(labels, turn)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(turn, labels.shape)
    check_same_grid(source, scan, found[0], (turned, turned_affine))
    return mask_of_labels(turned, found[0], wanted={1}, allowed={0, 1})


def _slice_labels(settings: Data, folder: Path, series: Sequence[Series]) -> npt.NDArray[np.int8]:
    """Labels along the axis to the head, which slice names have only in an axial series."""
    table = _table(settings)
    axis = axis_to_head(series[0].affine)
    said = table.named_slices(folder.name)
    if not said:
        return table.slice_labels(folder.name, series[0].image.shape[axis], settings.object)
    if axis != SLICE_AXIS:
        raise ValueError(
            f"{folder}: {table.path} labels slices by file, for which they must be axial; label "
            "the volume, or resample the series"
        )
    names = [_file_names(folder, files) for files in zip(*(item.files for item in series))]
    if not set(said) <= set().union(*names):
        for aliases, files in zip(names, zip(*(item.files for item in series))):
            aliases.update(_element(file, "SOPInstanceUID") for file in files)
    return table.slice_labels(folder.name, names, settings.object)


def _file_names(folder: Path, files: Sequence[Path]) -> set[str]:
    """The names of a slice's file: without its ending, by itself, with its folders."""
    names: set[str] = set()
    for file in files:
        ending = file.suffix if not file.suffix[1:].isdecimal() else ""  # names may be UIDs
        for name in (file.name, file.relative_to(folder).as_posix()):
            names |= {name, name.removesuffix(ending)}
    return names
