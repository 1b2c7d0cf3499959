"""One DICOM file: exact values whatever its encoding, or an error that names file and remedy."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import assert_refused, change, read_folder, save, series_datasets, write_series
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    RTStructureSetStorage,
)

IMAGE = np.arange(7 * 5 * 4, dtype=np.int16).reshape(7, 5, 4)  # (x, y, slices)


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE)
    for index, file in enumerate(files):
        change(file, RescaleSlope=str(0.5 + index), RescaleIntercept=str(-7 * index))
    image = read_folder(tmp_path).image
    assert image.dtype == np.float32
    for index in range(4):
        expected = IMAGE[:, :, index] * (0.5 + index) - 7 * index
        np.testing.assert_allclose(image[:, :, index], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("largest", "values", "dtype"),
    [
        (1000, {"RescaleSlope": "1", "RescaleIntercept": "-1024"}, np.int16),
        (1000, {"RescaleSlope": "2.0"}, np.int16),
        (1000, {"RescaleIntercept": "0.5"}, np.float32),
        (65535, {}, np.float32),
        (65535, {"RescaleSlope": "1", "RescaleIntercept": "-32768"}, np.int16),
    ],
)
def test_int16_where_that_loses_nothing(
    tmp_path: Path, largest: int, values: dict[str, str], dtype: type
) -> None:
    image = np.zeros((3, 3, 2), np.uint16)
    image[0, 0, 0] = largest
    write_series(tmp_path, image, **values)
    series = read_folder(tmp_path)
    assert series.image.dtype == dtype
    slope, intercept = values.get("RescaleSlope", 1), values.get("RescaleIntercept", 0)
    assert series.image[0, 0, 0] == largest * float(slope) + float(intercept)


def test_signed_values_and_unused_bits(tmp_path: Path) -> None:
    """12 bits stored of 16: what the upper four hold is not part of the value."""
    write_series(tmp_path / "signed", IMAGE - 70)
    np.testing.assert_array_equal(read_folder(tmp_path / "signed").image, IMAGE - 70)
    files = write_series(tmp_path / "masked", IMAGE, BitsStored=12, HighBit=11)
    for file in files:
        stored = dcmread(file).pixel_array
        change(file, PixelData=(stored | 0x7000).astype(np.uint16).tobytes())
    np.testing.assert_array_equal(read_folder(tmp_path / "masked").image, IMAGE)


def test_sloppy_files_are_read_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Decimals of more than 16 characters, and padding after the pixels; warnings are errors."""
    padded = IMAGE[:, :, 0].T.astype(np.uint16).tobytes() + bytes(6)
    long = ["1.00000000000000000", "1.00000000000000000"]
    file = write_series(tmp_path, IMAGE[:, :, :1])[0]
    dataset = dcmread(file)
    dataset.PixelData = padded
    with warnings.catch_warnings(action="ignore"):
        dataset.PixelSpacing = long
        dataset.save_as(file)
    np.testing.assert_array_equal(read_folder(tmp_path).image, IMAGE[:, :, :1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_are_read(tmp_path: Path, implicit: bool) -> None:
    for index, dataset in enumerate(series_datasets(IMAGE)):
        del dataset.file_meta
        content = io.BytesIO()
        dcmwrite(content, dataset, implicit_vr=implicit, little_endian=True)
        (tmp_path / f"{index}.dcm").write_bytes(content.getvalue())
    np.testing.assert_array_equal(read_folder(tmp_path).image, IMAGE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ImagePositionPatient": None}, ["ImagePositionPatient is missing", "NIfTI"]),
        ({"ImageOrientationPatient": None}, ["ImageOrientationPatient is missing", "NIfTI"]),
        ({"PixelSpacing": None}, ["PixelSpacing is missing", "NIfTI"]),
        ({"PixelSpacing": ""}, ["PixelSpacing is missing"]),
        ({"PixelSpacing": ["1"]}, ["PixelSpacing must be 2 numbers"]),
        ({"PixelSpacing": ["0", "1"]}, ["PixelSpacing must be > 0"]),
        ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, ["perpendicular unit"]),
        ({"SeriesInstanceUID": None}, ["SeriesInstanceUID is missing"]),
        ({"RescaleSlope": "0"}, ["RescaleSlope must not be 0"]),
        ({"ModalityLUTSequence": [Dataset()]}, ["Modality LUT", "NIfTI"]),
        ({"NumberOfFrames": 3}, ["multi-frame (3 frames", "single-frame"]),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, ["got RGB with 3", "gray"]),
        ({"SamplesPerPixel": 3}, ["got MONOCHROME2 with 3"]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, ["MONOCHROME1", "MONOCHROME2"]),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, ["PALETTE COLOR"]),
        ({"PixelData": None}, ["no pixel data", "fetch"]),
        ({"PixelData": b"12"}, ["cannot be decoded", "fetch"]),
        ({"PixelData": IMAGE.tobytes()}, ["pixel data must be (5, 7), got (4, 5, 7)"]),
    ],
)
def test_a_file_that_is_no_plain_slice_is_named(
    tmp_path: Path, values: dict[str, Any], words: list[str]
) -> None:
    files = write_series(tmp_path, IMAGE)
    change(files[2], **values)
    assert_refused(tmp_path, "002.dcm", *words)


@pytest.mark.parametrize(
    ("keyword", "text"), [("RescaleSlope", b"1,5 "), ("PixelSpacing", b"nan\\1 ")]
)
def test_a_number_that_is_none_is_named(tmp_path: Path, keyword: str, text: bytes) -> None:
    values = {keyword: "9999" if keyword == "RescaleSlope" else ["999", "1"]}
    file = write_series(tmp_path, IMAGE[:, :, :1], **values)[0]
    written = b"9999" if keyword == "RescaleSlope" else b"999\\1 "
    content = file.read_bytes()
    assert content.count(written) == 1
    file.write_bytes(content.replace(written, text))
    assert_refused(tmp_path, "000.dcm", keyword, "export the file again")


def test_an_element_without_end_does_not_tell_the_patients_name(tmp_path: Path) -> None:
    """The length of Modality is overwritten: its value goes on to the elements of the patient."""
    file = write_series(tmp_path, IMAGE[:, :, :1], patient="secret")[0]
    content = file.read_bytes()
    assert content.count(b"CS\x02\x00CT") == 1
    file.write_bytes(content.replace(b"CS\x02\x00CT", b"CS\x60\x00CT"))
    assert b"secret" in str(dcmread(file)["Modality"].value).encode()
    assert_refused(tmp_path, "000.dcm: the value of Modality is damaged; export the file again")


def test_a_damaged_transfer_syntax_is_named(tmp_path: Path) -> None:
    file = write_series(tmp_path, IMAGE[:, :, :1])[0]
    content = file.read_bytes()
    file.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.x.1\0"))
    assert_refused(tmp_path, "000.dcm: the value of TransferSyntaxUID is damaged")


def test_other_objects_in_the_folder_are_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE)
    contours = dcmread(files[0])
    contours.SOPClassUID = RTStructureSetStorage
    contours.Modality = "RTSTRUCT"
    for keyword in ("Rows", "Columns", "PixelData", "ImagePositionPatient"):
        del contours[keyword]
    save(tmp_path / "contours.dcm", contours)
    assert_refused(tmp_path, "contours.dcm holds no image (RTSTRUCT)", "move it out")


@pytest.mark.parametrize("kept", [0, 4, 140, 300, 700, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = write_series(tmp_path, IMAGE)[2]
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(tmp_path, "002.dcm")


def test_damaged_files_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    """Bytes overwritten at random, all over the file."""
    file = write_series(tmp_path, IMAGE[:, :, :1], patient="secret")[0]
    content = file.read_bytes()
    draw = random.Random(0)
    refusals = []
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            read_folder(tmp_path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert all("000.dcm" in message and "\n" not in message for message in refusals)
    assert not any("secret" in message for message in refusals)


def encoded(folder: Path, syntax: UID, frames: list[bytes]) -> list[Path]:
    """IMAGE in files of a transfer syntax that have these frames for pixel data."""
    files = []
    for index, (dataset, frame) in enumerate(zip(series_datasets(IMAGE), frames, strict=True)):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].VR = "OB"
        files.append(save(folder / f"{index}.dcm", dataset))
    return files


@pytest.mark.parametrize(
    ("syntax", "implicit"), [(ImplicitVRLittleEndian, True), (ExplicitVRBigEndian, False)]
)
def test_uncompressed_syntaxes_read_equal(tmp_path: Path, syntax: UID, implicit: bool) -> None:
    for index, dataset in enumerate(series_datasets(IMAGE)):
        dataset.file_meta.TransferSyntaxUID = syntax
        if not implicit:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
        save(tmp_path / f"{index}.dcm", dataset)
    np.testing.assert_array_equal(read_folder(tmp_path).image, IMAGE)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_losslessly_compressed_reads_equal(tmp_path: Path, syntax: UID) -> None:
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="no encoder and decoder of JPEG-LS is installed")
    for index, dataset in enumerate(series_datasets(IMAGE)):
        dataset.compress(syntax, generate_instance_uid=False)
        save(tmp_path / f"{index}.dcm", dataset)
    series = read_folder(tmp_path)
    np.testing.assert_array_equal(series.image, IMAGE)
    assert dcmread(series.files[0]).file_meta.TransferSyntaxUID == syntax


def test_jpeg_2000_reads_equal(tmp_path: Path) -> None:
    frames = []
    for plane in np.moveaxis(IMAGE, 2, 0):
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(plane.T).astype(np.uint16)).save(
            content, "JPEG2000", irreversible=False, no_jp2=True
        )
        frames.append(content.getvalue())
    encoded(tmp_path, JPEG2000Lossless, frames)
    np.testing.assert_array_equal(read_folder(tmp_path).image, IMAGE)


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEGLosslessSV1, "pylibjpeg-libjpeg"), (HTJ2KLossless, "pylibjpeg-openjpeg")],
)
def test_a_syntax_without_decoder_says_what_to_install(
    tmp_path: Path, syntax: UID, package: str
) -> None:
    if get_decoder(syntax).is_available:
        pytest.skip(f"a decoder of {syntax.name} is installed")
    encoded(tmp_path, syntax, [b"\xff\xd8\xff\xd9"] * 4)
    assert_refused(
        tmp_path,
        "0.dcm",
        syntax.name,
        syntax,
        "no decoder",
        "pip install",
        f"pylibjpeg>=2.0 and {package}",
        "gdcmconv --raw",
    )


def test_a_syntax_that_nobody_decodes_says_so(tmp_path: Path) -> None:
    encoded(tmp_path, UID("1.2.840.10008.1.2.4.100"), [b"\x00\x00"] * 4)  # MPEG2
    assert_refused(tmp_path, "0.dcm", "MPEG2", "no decoder", "gdcmconv --raw")


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEGExtended12Bit, "pylibjpeg-libjpeg"), (JPEG2000Lossless, "pylibjpeg-openjpeg")],
)
def test_frames_that_cannot_be_decoded_are_named(tmp_path: Path, syntax: UID, package: str) -> None:
    encoded(tmp_path, syntax, [b"\xff\xd8\xff\xd9"] * 4)
    assert_refused(tmp_path, "0.dcm", syntax.name, "cannot be decoded", "fetch it again", package)
