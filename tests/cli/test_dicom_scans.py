"""DICOM from end to end: trained on series with a list of labels, and on CHAOS's own folders."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from chaos_files import chaos, organs, write_t1
from dicom_files import change, write_series

from cldf_dist.__main__ import main
from cldf_dist.cli.new_scans import load_segmenter
from cldf_dist.data.formats.dicom import dicom_files, read_series
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.chaos import read_patient
from cldf_dist.data.readers.phantom import PhantomSettings, phantom_patient
from cldf_dist.scoring.mask_files import mask_path

DEBUG = str(Path(__file__).resolve().parents[2] / "configs" / "debug.yaml")
QUICK = (
    *("tracking.enabled=false", "evaluate.upper_bound=false"),
    *("cg_diff.enabled=false", "cg_cdm.enabled=false", "evaluate.resamples=50"),
)
PHANTOM = PhantomSettings(num_patients=20, num_slices=6, grid_size=32)
SPACING = (6.0, 6.0, 12.0)  # mm
SHUFFLED = (3, 0, 5, 1, 4, 2)  # file number of each slice

pytestmark = pytest.mark.slow


def write_head(folder: Path, index: int, *, modality: str = "MR") -> tuple[np.ndarray, np.ndarray]:
    """One channel of a phantom patient as a series; its image and mask (x, y, slices)."""
    image, mask, _ = phantom_patient(index, PHANTOM)
    write_series(
        folder,
        image[0],
        name=lambda number: f"slice_{SHUFFLED[number]}.dcm",
        modality=modality,
        patient=folder.name,
        spacing=SPACING,
        origin=(-90.0, -80.0, 40.0),
    )
    return image[0], mask > 0


def write_study(root: Path) -> Path:
    """Nine heads as DICOM, masks for some, and slice labels for all but the smallest lesions."""
    lines = ["patient,slice,lesion"]
    for index in range(9):
        folder = root / f"head_{index}"
        _, mask = write_head(folder, index)
        for number in range(6):
            size = int(mask[:, :, number].sum())
            label = "" if 0 < size < 4 else str(int(size > 0))
            lines.append(f"head_{index},slice_{SHUFFLED[number]},{label}")
        affine = read_series(dicom_files(folder), name="head").affine
        write_nifti(folder / "mask.nii.gz", mask.astype(np.uint8), affine)
    labels = root.parent / "labels.csv"
    labels.write_text("\n".join(lines))
    return labels


@pytest.fixture(scope="module")
def dicom_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom_study")
    labels = write_study(folder / "series")
    words = [
        *(DEBUG, "data.dataset=dicom", f"data.root={folder / 'series'}", f"data.labels={labels}"),
        *(f"runs={folder / 'runs'}", "name=heads", *QUICK),
    ]
    assert main(["run", *words]) == 0
    return folder


def mask_by_position(seg: pydicom.Dataset, files: list[Path]) -> np.ndarray:
    """A DICOM segmentation read with pydicom alone: its frames at the place of their slices."""
    frames = np.atleast_3d(seg.pixel_array) if seg.get("NumberOfFrames", 0) else np.zeros((0,))
    if frames.ndim == 3 and frames.shape[0] != int(seg.NumberOfFrames):
        frames = np.moveaxis(frames, -1, 0)
    places = {}
    for group, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        places[tuple(round(float(value), 3) for value in position)] = frame
    planes = []
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        key = tuple(round(float(value), 3) for value in header.ImagePositionPatient)
        planes.append(places.get(key, np.zeros((header.Rows, header.Columns))).T > 0)
    return np.stack(planes, axis=2)


def test_a_study_of_series_and_a_list_of_labels_ends_with_masks(dicom_study: Path) -> None:
    study = dicom_study / "runs" / "heads"
    assert (study / "report" / "report.html").is_file()
    masks = sorted((study / "segment" / "masks" / "cldf").iterdir())
    assert masks
    for path in masks:
        series = read_series(
            dicom_files(dicom_study / "series" / path.name.split(".")[0]), name="head"
        )
        mask, affine = read_nifti(path)
        assert mask.shape == series.image.shape
        np.testing.assert_allclose(affine, series.affine, atol=1e-3)


def test_a_changed_list_of_labels_is_told(
    dicom_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.csv"
    words = [
        *(DEBUG, "data.dataset=dicom", f"data.root={dicom_study / 'series'}", "name=heads"),
        *(f"runs={dicom_study / 'runs'}", f"data.labels={labels}", *QUICK),
    ]
    labels.write_text((dicom_study / "labels.csv").read_text())
    assert main(["prepare", *words]) == 0, "the content counts, not the place"
    labels.write_text(labels.read_text() + "\n")
    assert main(["prepare", *words]) == 1
    assert f"{labels} has changed since: restore the file" in capsys.readouterr().err


def test_a_new_series_gets_a_mask_in_its_own_frame_of_reference(
    dicom_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = write_head(tmp_path / "new" / "ann", 15)
    write_head(tmp_path / "new" / "nested" / "deep" / "bob", 16)
    output = tmp_path / "out"
    words = [
        *(DEBUG, "data.dataset=dicom", "data.root=gone", "data.labels=gone.csv", "name=heads"),
        *(f"runs={dicom_study / 'runs'}", *QUICK, "segment.gate_probability=0"),
    ]
    assert main(["segment", *words, f"input={tmp_path / 'new'}", f"output={output}"]) == 0
    names = [f"{name}_{kind}" for name in ("ann", "nested") for kind in ("mask.nii.gz", "seg.dcm")]
    assert capsys.readouterr().out.splitlines() == [str(output / name) for name in names]
    mask, affine = read_nifti(output / "ann_mask.nii.gz")
    assert mask.shape == image.shape
    files = dicom_files(tmp_path / "new" / "ann")
    series = read_series(files, name="ann")
    np.testing.assert_allclose(affine, series.affine, atol=1e-3)
    seg = pydicom.dcmread(output / "ann_seg.dcm")
    source = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert seg.Modality == "SEG"
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert seg.SegmentSequence[0].SegmentLabel == "object"
    np.testing.assert_array_equal(mask_by_position(seg, list(series.files)), mask > 0)


def test_one_file_of_a_series_stands_for_it(dicom_study: Path, tmp_path: Path) -> None:
    write_head(tmp_path / "ann", 15)
    segmenter = load_segmenter(dicom_study / "runs" / "heads", gate_probability=0.0)
    by_folder = segmenter.segment(tmp_path / "ann")
    by_file = segmenter.segment(tmp_path / "ann" / "slice_2.dcm")
    np.testing.assert_array_equal(by_file.mask, by_folder.mask)
    assert by_file.dicom_files == by_folder.dicom_files


def test_a_mask_beside_a_series_is_left_alone_and_the_patient_gives_the_name(
    dicom_study: Path, tmp_path: Path
) -> None:
    """The layout of the training data: the series in a folder of its own, mask.nii.gz beside."""
    for name in ("ann", "bob"):
        image, mask = write_head(tmp_path / name / "SERIES", 15)
        write_nifti(tmp_path / name / "mask.nii.gz", mask.astype(np.uint8), np.eye(4))
    segmenter = load_segmenter(dicom_study / "runs" / "heads")
    scans = segmenter.find(tmp_path)
    assert [scan.name for scan in scans] == ["ann", "bob"]
    np.testing.assert_array_equal(scans[0].read().image[0], image)
    (alone,) = segmenter.find(tmp_path / "ann")
    assert alone.name == "ann_SERIES", "nobody knows which of the two folders is the patient's"


def test_the_nifti_mask_is_kept_where_no_dicom_seg_can_be_made(
    dicom_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_head(tmp_path / "in" / "ann", 15)
    for file in dicom_files(tmp_path / "in" / "ann"):
        change(file, FrameOfReferenceUID=None)  # some tools that anonymise take it out
    words = [
        *(DEBUG, "data.dataset=dicom", "data.root=gone", "data.labels=gone.csv", "name=heads"),
        *(f"runs={dicom_study / 'runs'}", *QUICK),
    ]
    out = tmp_path / "out"
    assert main(["segment", *words, f"input={tmp_path / 'in' / 'ann'}", f"output={out}"]) == 1
    assert "the mask is there as NIfTI, but cannot be made a DICOM-SEG" in capsys.readouterr().err
    names = sorted(path.name for path in out.iterdir())
    assert names == ["ann_mask.nii.gz", "ann_probability.nii.gz"]


def test_chaos_masks_come_back_as_nifti_and_as_png(tmp_path: Path) -> None:
    root = tmp_path / "chaos"
    grays = organs((24, 20, 6))
    grays[..., 4:] = 0
    for patient in range(1, 7):
        write_t1(root, str(patient), grays=grays, order=(2, 0, 3, 1, 5, 4))
    words = [
        *(DEBUG, "data.dataset=chaos", f"data.root={root}", "data.image_size=16"),
        *(
            "features.taps=[up1.1]",
            "data.object=right_kidney+left_kidney",
            "plus.negative_fraction=0.5",
        ),
        *(f"runs={tmp_path / 'runs'}", "name=chaos", *QUICK),
    ]
    assert main(["run", *words]) == 0
    segment = tmp_path / "runs" / "chaos" / "segment"
    masks = sorted((segment / "masks" / "cldf").iterdir())
    assert masks
    for path in masks:
        patient = path.name.split(".")[0]
        mask, affine = read_nifti(mask_path(segment, "cldf", patient))
        original = read_patient(chaos(root), patient)
        np.testing.assert_allclose(affine, original.affine, atol=1e-3)
        # their PNG files beside the images of the data set: its own reader finds the same mask
        again = tmp_path / "again" / "MR" / patient.split("_")[1] / "T1DUAL"
        again.mkdir(parents=True)
        theirs = segment / "chaos" / "cldf" / "MR" / patient.split("_")[1] / "T1DUAL" / "Ground"
        os.symlink(theirs, again / "Ground")
        os.symlink(
            root / "MR" / patient.split("_")[1] / "T1DUAL" / "DICOM_anon", again / "DICOM_anon"
        )
        found = read_patient(chaos(tmp_path / "again", name="right_kidney+left_kidney"), patient)
        assert found.mask is not None
        np.testing.assert_array_equal(found.mask, mask > 0)
    new = [*words, f"input={root / 'MR' / '2'}", f"output={tmp_path / 'out'}"]
    assert main(["segment", *new]) == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["MR_2_mask.nii.gz", "MR_2_probability.nii.gz", "MR_2_seg.dcm", "chaos"]
