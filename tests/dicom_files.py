"""Tiny DICOM series, valid enough for viewers and for the libraries that read them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from cldf_dist.data.formats.dicom import Series, dicom_files, read_series

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def uid(*words: str) -> str:
    """The same UID for the same words."""
    return str(generate_uid(entropy_srcs=[*words, "test"]))


def series_datasets(
    image: npt.NDArray[Any],
    *,
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    orientation: Sequence[float] = AXIAL,
    modality: str = "CT",
    patient: str = "anonymous",
    series: str = "1",
    **values: Any,
) -> list[Dataset]:
    """One dataset per slice of (x, y, slices) integers, ascending along the slices' normal.

    Spacing in mm is that of (x, y, slices), origin and orientation are LPS, as DICOM has them.
    `values` are further elements of every slice; None leaves one out.
    """
    row, column = np.reshape(orientation, (2, 3)).astype(float)
    normal = np.cross(row, column)
    datasets = []
    for index in range(image.shape[2]):
        position = np.asarray(origin, float) + index * spacing[2] * normal
        dataset = _dataset(modality, patient, series, index)
        dataset.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        dataset.SliceThickness = _decimal(spacing[2])
        dataset.ImagePositionPatient = [_decimal(value) for value in position]
        dataset.ImageOrientationPatient = [_decimal(value) for value in orientation]
        _set_pixels(dataset, image[:, :, index].T)
        _set(dataset, values)
        datasets.append(dataset)
    return datasets


def write_series(
    folder: Path,
    image: npt.NDArray[Any],
    *,
    name: Callable[[int], str] = "{:03d}.dcm".format,
    **description: Any,
) -> list[Path]:
    """Write a series as `series_datasets` describes it; the files in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = series_datasets(image, **description)
    return [save(folder / name(index), dataset) for index, dataset in enumerate(datasets)]


def save(path: Path, dataset: Dataset) -> Path:
    """Write one dataset as a file that begins as PS3.10 asks."""
    with warnings.catch_warnings():  # of values that are wrong on purpose
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
        dataset.save_as(path, enforce_file_format=True)
    return path


def change(file: Path, **values: Any) -> None:
    """Write a file anew with other elements; None takes one out."""
    dataset = dcmread(file)
    _set(dataset, values)
    save(file, dataset)


def read_folder(folder: Path) -> Series:
    """Every DICOM file of a folder as one series, called "scan 1"."""
    return read_series(dicom_files(folder), name="scan 1")


def assert_refused(folder: Path, *words: str) -> None:
    """The series is refused in one line that has all these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _set(dataset: Dataset, values: dict[str, Any]) -> None:
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)


def _dataset(modality: str, patient: str, series: str, index: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    dataset.SOPInstanceUID = uid(patient, modality, series, str(index))
    dataset.SeriesInstanceUID = uid(patient, modality, series)
    dataset.StudyInstanceUID = uid(patient)
    dataset.FrameOfReferenceUID = uid(patient, "frame")
    dataset.Modality = modality
    dataset.PatientID = patient
    dataset.PatientName = f"{patient}^Phantom"
    dataset.StudyID = "1"
    dataset.StudyDate = "20200101"
    dataset.StudyTime = "120000"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = index + 1
    return dataset


def _set_pixels(dataset: Dataset, plane: npt.NDArray[Any]) -> None:
    stored = np.ascontiguousarray(plane, np.int16 if plane.min() < 0 else np.uint16)
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = int(stored.dtype == np.int16)
    dataset.PixelData = stored.tobytes()


def _decimal(value: float) -> str:
    """At most 16 characters, as a DS element may have."""
    return f"{value:.9g}"
