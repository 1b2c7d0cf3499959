"""A segmentation leads back to the mask, slice by slice, and to the series it belongs to."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dicom_files import AXIAL, change, write_series
from pydicom import Dataset, dcmread
from pydicom.errors import BytesLengthException
from pydicom.uid import SegmentationStorage

from cldf_dist.data.formats.dicom import dicom_files, read_series
from cldf_dist.data.formats.dicom_seg import write_dicom_seg

SHAPE = (37, 53, 5)  # x, y, slices: 1961 pixels, so that no frame but the first begins a byte
OBLIQUE = (0.0, 0.6, 0.8, 1.0, 0.0, 0.0)

Mask = npt.NDArray[np.bool_]


def random_mask(shape: tuple[int, ...] = SHAPE) -> Mask:
    return np.asarray(np.random.default_rng(0).random(shape) < 0.3)


def source(folder: Path, **description: Any) -> tuple[Path, ...]:
    """The files of a series in the order of its slices; their names are in none."""
    names = random.Random(0).sample(range(100), SHAPE[2])
    image = np.zeros(SHAPE, np.int16)
    write_series(folder, image, name=lambda index: f"{names[index]}.dcm", **description)
    return read_series(dicom_files(folder), name="source").files


def write(path: Path, mask: Mask, files: Sequence[Path], label: str = "liver") -> Dataset:
    write_dicom_seg(path, mask, files, label=label, software_version="1.2.3")
    return dcmread(path)


def read_back(segmentation: Dataset, files: Sequence[Path], shape: tuple[int, ...]) -> Mask:
    """Bits to voxels by the standard alone: PS3.5, 8.1.1, and the frames' functional groups.

    Each frame goes to the slice it refers to, and must lie where that slice lies.
    """
    sources = [dcmread(file, stop_before_pixels=True) for file in files]
    slices = {dataset.SOPInstanceUID: index for index, dataset in enumerate(sources)}
    size = segmentation.NumberOfFrames, segmentation.Rows, segmentation.Columns
    bits = np.unpackbits(np.frombuffer(segmentation.PixelData, np.uint8), bitorder="little")
    frames = bits[: np.prod(size)].reshape(size).astype(bool)
    mask = np.zeros(shape, bool)
    groups = segmentation.PerFrameFunctionalGroupsSequence
    for frame, group in zip(frames, groups, strict=True):
        (reference,) = group.DerivationImageSequence[0].SourceImageSequence
        index = slices[reference.ReferencedSOPInstanceUID]
        place = group.PlanePositionSequence[0].ImagePositionPatient
        assert place == pytest.approx(list(sources[index].ImagePositionPatient), abs=1e-4)
        assert not mask[:, :, index].any()
        mask[:, :, index] = frame.T
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert list(orientation) == pytest.approx(list(sources[0].ImageOrientationPatient))
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    assert list(spacing) == pytest.approx(list(sources[0].PixelSpacing))
    return mask


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("kind", ["random", "few slices", "one voxel", "full", "empty"])
def test_mask_comes_back_voxel_by_voxel(
    tmp_path: Path, kind: str, orientation: tuple[float, ...]
) -> None:
    mask = np.full(SHAPE, kind == "full")
    if kind == "one voxel":
        mask[36, 50, 3] = True
    if kind in ("random", "few slices"):
        mask = random_mask()
        mask[:, :, 1:4:2] &= kind == "random"
    files = source(tmp_path / "source", orientation=orientation, spacing=(0.7, 0.9, 2.5))
    segmentation = write(tmp_path / "seg.dcm", mask, files)
    np.testing.assert_array_equal(read_back(segmentation, files, SHAPE), mask)
    filled = int(mask.any(axis=(0, 1)).sum())
    assert segmentation.NumberOfFrames == (filled or SHAPE[2])


def test_files_in_descending_order_are_not_mixed_up(tmp_path: Path) -> None:
    """A mask belongs to the files as they are given, whatever runs along the normal."""
    files = source(tmp_path / "source")[::-1]
    segmentation = write(tmp_path / "seg.dcm", random_mask(), files)
    np.testing.assert_array_equal(read_back(segmentation, files, SHAPE), random_mask())


def test_a_single_slice_is_enough(tmp_path: Path) -> None:
    files = source(tmp_path / "source")[:1]
    segmentation = write(tmp_path / "seg.dcm", random_mask()[:, :, :1], files)
    found = read_back(segmentation, files, (*SHAPE[:2], 1))
    np.testing.assert_array_equal(found, random_mask()[:, :, :1])


def test_segmentation_belongs_to_its_source(tmp_path: Path) -> None:
    files = source(tmp_path / "source", patient="P7", PatientBirthDate="19600102", PatientSex="F")
    segmentation = write(tmp_path / "seg.dcm", random_mask(), files)
    origin = dcmread(files[0])
    kept = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID")
    for keyword in (*kept, "StudyDate", "StudyTime", "StudyID", "FrameOfReferenceUID"):
        assert segmentation[keyword].value == origin[keyword].value
    (series,) = segmentation.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == origin.SeriesInstanceUID != segmentation.SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert referenced == {dcmread(file).SOPInstanceUID for file in files}
    assert segmentation.file_meta.MediaStorageSOPClassUID == SegmentationStorage
    assert (segmentation.Modality, segmentation.SegmentationType) == ("SEG", "BINARY")
    assert segmentation.BitsAllocated == 1
    assert segmentation.ContentCreatorName == ""


@pytest.mark.parametrize(
    ("label", "category", "kind"),
    [
        ("liver", "Anatomical Structure", "Liver"),
        ("left kidney", "Anatomical Structure", "Kidney"),
        ("Spleen", "Anatomical Structure", "Spleen"),
        ("whole tumour", "Morphologically Abnormal Structure", "Lesion"),
        ("liver lesions", "Morphologically Abnormal Structure", "Lesion"),
        ("object", "Tissue", "Tissue"),
    ],
)
def test_segment_says_what_it_is(tmp_path: Path, label: str, category: str, kind: str) -> None:
    segmentation = write(tmp_path / "seg.dcm", random_mask(), source(tmp_path / "source"), label)
    (segment,) = segmentation.SegmentSequence
    assert segment.SegmentLabel == label
    assert label in segmentation.SeriesDescription
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == category
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == kind
    assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", "CLDF")
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmVersion == "1.2.3"


def all_uids(segmentation: Dataset) -> list[str]:
    return [str(element.value) for element in segmentation.iterall() if element.VR == "UI"]


def test_same_input_gives_the_same_uids(tmp_path: Path) -> None:
    files = source(tmp_path / "source")
    first = write(tmp_path / "a.dcm", random_mask(), files)
    second = write(tmp_path / "b.dcm", random_mask(), files)
    assert all_uids(first) == all_uids(second)
    changed = random_mask()
    changed[0, 0, 0] ^= True
    third = write(tmp_path / "c.dcm", changed, files)
    fourth = write(tmp_path / "d.dcm", random_mask(), files, "spleen")
    assert len({item.SOPInstanceUID for item in (first, third, fourth)}) == 3
    assert len({item.SeriesInstanceUID for item in (first, third, fourth)}) == 3


def test_sources_that_lack_what_may_be_empty_are_not_edited(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As an anonymiser leaves them; a name without ^ is neither doubted nor printed."""
    gone = ("PatientID", "StudyID", "StudyTime")
    values = {"PatientSex": "U", "PatientBirthDate": "", "PatientName": "secret"}
    files = source(tmp_path / "source", **dict.fromkeys(gone), **values)
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"20200101", b"20209999"))
    before = [file.read_bytes() for file in files]
    segmentation = write(tmp_path / "seg.dcm", random_mask(), files)
    for keyword in (*gone, "StudyDate", "PatientSex", "PatientBirthDate", "AccessionNumber"):
        assert not segmentation[keyword].value
    assert segmentation.PatientName == "secret"
    assert [file.read_bytes() for file in files] == before
    assert capfd.readouterr() == ("", "")


def test_names_keep_their_letters(tmp_path: Path) -> None:
    code = Dataset()
    code.CodeMeaning = "Schädel"
    values = {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"}
    values |= {"StudyDescription": "Größe", "ProcedureCodeSequence": [code]}
    files = source(tmp_path / "source", **values)
    segmentation = write(tmp_path / "seg.dcm", random_mask(), files, "Läsion β")
    assert str(segmentation.PatientName) == "Müller^Jörg"
    assert segmentation.StudyDescription == "Größe"
    assert segmentation.ProcedureCodeSequence[0].CodeMeaning == "Schädel"
    assert segmentation.SegmentSequence[0].SegmentLabel == "Läsion β"


def test_damage_elsewhere_in_a_header_does_no_harm(tmp_path: Path) -> None:
    """A 16-bit number of three bytes."""
    files = source(tmp_path / "source", SmallestImagePixelValue=1)
    for file in files:
        content = file.read_bytes()
        assert content.count(b"\x06\x01US\x02\x00\x01\x00") == 1
        damaged = content.replace(b"\x06\x01US\x02\x00", b"\x06\x01US\x03\x00\x00")
        file.write_bytes(damaged)
    with pytest.raises(BytesLengthException):
        dcmread(files[0])["SmallestImagePixelValue"]
    segmentation = write(tmp_path / "seg.dcm", random_mask(), files)
    np.testing.assert_array_equal(read_back(segmentation, files, SHAPE), random_mask())


def test_empty_mask_is_written_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "seg.dcm", np.zeros(SHAPE, bool), source(tmp_path / "source"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("keyword", "other"),
    [("FrameOfReferenceUID", None), ("StudyInstanceUID", None), ("SOPInstanceUID", "")],
)
def test_sources_without_identity_are_refused(
    tmp_path: Path, keyword: str, other: str | None
) -> None:
    files = source(tmp_path / "source")
    change(files[2], **{keyword: other})
    with pytest.raises(ValueError, match=rf"{files[2].name}: {keyword} is missing.*NIfTI"):
        write(tmp_path / "seg.dcm", random_mask(), files)


def test_sources_of_two_series_are_refused(tmp_path: Path) -> None:
    files = source(tmp_path / "source")
    change(files[2], SeriesInstanceUID="1.2.3")
    with pytest.raises(ValueError, match=r"cannot be referred to .* same series.*NIfTI"):
        write(tmp_path / "seg.dcm", random_mask(), files)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (random_mask()[:, :, :4], "the mask has 4 slices, its series 5 files"),
        (random_mask().swapaxes(0, 1), "has 37 columns and 53 rows, the mask 53 and 37"),
        (random_mask()[:, :, 0], r"must be bool \(x, y, slices\)"),
        (random_mask().astype(np.uint8), r"must be bool \(x, y, slices\), got uint8"),
    ],
)
def test_mask_of_another_size_is_refused(tmp_path: Path, mask: Mask, rule: str) -> None:
    files = source(tmp_path / "source")
    with pytest.raises(ValueError, match=rule):
        write(tmp_path / "seg.dcm", mask, files)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize(
    ("name", "label", "rule"),
    [
        ("seg.nii", "liver", "must end in .dcm"),
        ("seg.dcm", "", "1 to 64 characters"),
        ("seg.dcm", "x" * 65, "1 to 64 characters"),
    ],
)
def test_file_name_and_label_are_checked(tmp_path: Path, name: str, label: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        write(tmp_path / name, random_mask(), [], label)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    files = source(tmp_path / "source")
    (tmp_path / "out" / "seg.dcm").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "out" / "seg.dcm", random_mask(), files)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["seg.dcm"]


def test_development_ct_goes_to_a_segmentation_and_back(tmp_path: Path) -> None:
    default = Path(__file__).parents[3].parent / "shared" / "data"
    root = Path(os.environ.get("CLDF_DATA", default))
    folders = sorted(root.glob("chaos/Train_Sets/CT/*/DICOM_anon"))
    if not folders:
        pytest.skip(f"no development data: set CLDF_DATA to its folder ({root} has no CHAOS CT)")
    series = read_series(dicom_files(folders[0]), name="CT")
    mask = series.image > 60
    segmentation = write(tmp_path / "seg.dcm", mask, series.files)
    np.testing.assert_array_equal(read_back(segmentation, series.files, mask.shape), mask)
