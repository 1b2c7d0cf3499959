"""One DICOM file of a series: its place in space, and its pixels as real-world values."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

Vector = npt.NDArray[np.float64]

MAGIC, MAGIC_OFFSET = b"DICM", 128  # PS3.10, 7.1
ORIENTATION_TOLERANCE = 1e-3  # of direction cosines, often given with few digits
CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}")  # PS3.5, 6.2
LARGEST = 1e15  # no number of a header is; what is computed from them stays finite
_SERIES_TAGS = ["SeriesInstanceUID", "EchoTime"]
_HEADER_TAGS = [
    *_SERIES_TAGS,
    *("Modality", "MagneticFieldStrength", "SliceThickness", "SpacingBetweenSlices"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),
    *("NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
]
_PIXEL_TAGS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
]


@dataclass(frozen=True, eq=False)
class Header:
    """The elements of a file that are about its slice; nothing about the patient."""

    file: Path
    series: str
    modality: str
    echo_time: float | None  # ms
    field_strength: float | None  # T
    shape: tuple[int, int]  # rows, columns
    position: Vector  # (3,), mm, LPS: the centre of the first pixel
    orientation: Vector  # (2, 3): along a row, along a column
    pixel_spacing: Vector  # (2,), mm: between rows, between columns
    thickness: float | None  # mm to the next slice
    slope: float
    intercept: float


def has_magic(file: Path) -> bool:
    """True where the file begins as PS3.10 asks; files older than that have no such beginning."""
    with file.open("rb") as start:
        return start.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings about sloppy files; what matters to us is checked by value."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
        yield


def read_dataset(file: Path, tags: Sequence[str] | None = None, *, pixels: bool = False) -> Dataset:
    """The elements of a file, of these keywords alone where given; to be used under `quiet`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        return dcmread(
            file,
            specific_tags=None if tags is None else list(tags),
            stop_before_pixels=not pixels,
            force=not has_magic(file),
        )
    except Exception as error:  # a damaged file fails anywhere in the parser
        raise ValueError(
            f"{file} is not a readable DICOM file: {_one_line(error)}; fetch it again"
        ) from error


def read_series_key(file: Path) -> tuple[str, float | None]:
    """SeriesInstanceUID and echo time in ms."""
    with quiet():
        dataset = read_dataset(file, _SERIES_TAGS)
        return _series_uid(dataset, file), _number(dataset, "EchoTime", file)


def read_header(file: Path) -> Header:
    """The header of one slice; no pixels are read.

    Raises FileNotFoundError, or ValueError where it is no plain gray image with a place in space.
    """
    with quiet():
        dataset = read_dataset(file, _HEADER_TAGS)
        shape = _plain_image_shape(dataset, file)
        slope = _number(dataset, "RescaleSlope", file)
        if slope == 0:
            raise ValueError(f"{file}: RescaleSlope must not be 0; repair or export it again")
        pixel_spacing = _numbers(dataset, "PixelSpacing", file, count=2)
        if pixel_spacing.min() <= 0:
            raise ValueError(
                f"{file}: PixelSpacing must be > 0, got {pixel_spacing.tolist()}; export it again"
            )
        spacing = _number(dataset, "SpacingBetweenSlices", file)
        return Header(
            file=file,
            series=_series_uid(dataset, file),
            modality=_code(dataset, "Modality", file),
            echo_time=_number(dataset, "EchoTime", file),
            field_strength=_number(dataset, "MagneticFieldStrength", file),
            shape=shape,
            position=_numbers(dataset, "ImagePositionPatient", file, count=3),
            orientation=_orientation(dataset, file),
            pixel_spacing=pixel_spacing,
            thickness=spacing or _number(dataset, "SliceThickness", file),
            slope=1.0 if slope is None else slope,
            intercept=_number(dataset, "RescaleIntercept", file) or 0.0,
        )


def read_pixels(header: Header) -> npt.NDArray[Any]:
    """Rescaled values (rows, columns), int16 where that loses nothing, else float32.

    Raises ValueError for truncated pixels and where no decoder is installed.
    """
    values = _stored_values(header) * header.slope + header.intercept
    limits = np.iinfo(np.int16)
    fits = values.min() >= limits.min and values.max() <= limits.max
    if fits and (values == np.rint(values)).all():
        return values.astype(np.int16)
    return values.astype(np.float32)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _value(dataset: Dataset, keyword: str, file: Path) -> Any:
    """None where the element is missing or empty."""
    try:
        return dataset.get(keyword)
    except Exception as error:  # elements are decoded when they are asked for
        raise _damaged(keyword, file) from error


def _damaged(keyword: str, file: Path) -> ValueError:
    """Without the value: one that has lost its end goes on with the patient's name."""
    return ValueError(f"{file}: the value of {keyword} is damaged; export the file again")


def _code(dataset: Dataset, keyword: str, file: Path) -> str:
    """A code string (CS), empty where it is missing."""
    code = str(_value(dataset, keyword, file) or "")
    if not CODE_STRING.fullmatch(code):
        raise _damaged(keyword, file)
    return code


def _number(dataset: Dataset, keyword: str, file: Path) -> float | None:
    """The first number of an element, None where it is missing or empty."""
    numbers = _numbers(dataset, keyword, file)
    return float(numbers[0]) if numbers.size else None


def _numbers(dataset: Dataset, keyword: str, file: Path, *, count: int | None = None) -> Vector:
    """The numbers of an element; exactly `count` of them where given."""
    value = _value(dataset, keyword, file)
    try:
        numbers = np.atleast_1d(np.asarray([] if value is None else value, np.float64))
    except (TypeError, ValueError) as error:
        raise _damaged(keyword, file) from error
    if numbers.ndim != 1 or not (np.abs(numbers) < LARGEST).all():
        rule = f"must be numbers below {LARGEST:g}, got {numbers.tolist()}"
    elif count is not None and not numbers.size:
        rule = "is missing, without it the slice has no place in space"
    elif count is not None and numbers.size != count:
        rule = f"must be {count} numbers, got {numbers.tolist()}"
    else:
        return numbers
    raise ValueError(f"{file}: {keyword} {rule}; export the file again or convert it to NIfTI")


def _orientation(dataset: Dataset, file: Path) -> Vector:
    orientation = _numbers(dataset, "ImageOrientationPatient", file, count=6).reshape(2, 3)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > 2 * ORIENTATION_TOLERANCE:
        raise ValueError(
            f"{file}: ImageOrientationPatient must be two perpendicular unit vectors, "
            f"got {orientation.ravel().tolist()}; export it again"
        )
    return orientation


def _series_uid(dataset: Dataset, file: Path) -> str:
    series = str(_value(dataset, "SeriesInstanceUID", file) or "")
    if not series:
        raise ValueError(f"{file}: SeriesInstanceUID is missing; export the file again")
    return series


def _plain_image_shape(dataset: Dataset, file: Path) -> tuple[int, int]:
    """Rows and columns of a single gray frame of stored values in which brighter is more."""
    rows, columns = (int(_number(dataset, tag, file) or 0) for tag in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        kind = _code(dataset, "Modality", file) or "of no modality"
        raise ValueError(f"{file} holds no image ({kind}); move it out of the folder of the series")
    frames = int(_number(dataset, "NumberOfFrames", file) or 1)
    if frames > 1:
        raise ValueError(
            f"{file} is multi-frame ({frames} frames in one file), one slice a file is read; "
            "convert it to single-frame DICOM (emf2sf of dcm4che) or to NIfTI (dcm2niix)"
        )
    samples = int(_number(dataset, "SamplesPerPixel", file) or 1)
    kind = _code(dataset, "PhotometricInterpretation", file)
    if samples != 1 or kind != "MONOCHROME2":
        raise ValueError(
            f"{file} must be MONOCHROME2 with 1 sample per pixel, got {kind or 'nothing'} with "
            f"{samples}; export the original gray images or convert them to NIfTI"
        )
    if "ModalityLUTSequence" in dataset:
        raise ValueError(
            f"{file}: a Modality LUT Sequence is not applied, only RescaleSlope and "
            "RescaleIntercept are; convert it to NIfTI"
        )
    return rows, columns


def _stored_values(header: Header) -> npt.NDArray[np.float64]:
    file = header.file
    with quiet():
        dataset = read_dataset(file, _PIXEL_TAGS, pixels=True)
        if "PixelData" not in dataset:
            raise ValueError(f"{file} has no pixel data: truncated or stripped; fetch it again")
        syntax = _transfer_syntax(dataset)
        if not syntax.is_valid:
            raise _damaged("TransferSyntaxUID", file)
        try:
            stored = pixel_array(dataset)
        except Exception as error:  # decoders have no common exception
            raise _undecodable(syntax, file, error) from error
    if stored.shape != header.shape:
        raise ValueError(
            f"{file}: pixel data must be {header.shape}, got {stored.shape}; fetch it again"
        )
    return stored.astype(np.float64)


def _transfer_syntax(dataset: Dataset) -> UID:
    """Set to what the parser found where the file does not say it."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not isinstance(syntax, UID):
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
        dataset.file_meta.TransferSyntaxUID = syntax
    return syntax


def _undecodable(syntax: UID, file: Path, error: Exception) -> ValueError:
    """The error for pixels of a transfer syntax, with the decoders that could be installed."""
    try:
        decoder = get_decoder(syntax)
        is_available, missing = decoder.is_available, "; ".join(decoder.missing_dependencies)
    except NotImplementedError:
        is_available, missing = False, ""
    install = f"pip install what one decoder needs ({missing})"
    if is_available:
        another = f", or {install}" if missing else ""
        return ValueError(
            f"{file} ({syntax.name}) cannot be decoded: {_one_line(error)}; fetch it again{another}"
        )
    return ValueError(
        f"{file}: for transfer syntax {syntax.name} ({syntax}) no decoder is installed; "
        f"{f'{install}, or ' if missing else ''}decompress it with gdcmconv --raw or dcmdjpeg"
    )
