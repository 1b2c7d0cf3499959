"""New scans in every form that they come in, segmented by runs of the debug size."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cldf_dist
from cldf_dist.__main__ import main
from cldf_dist.cli.new_scans import Segmentation, load_segmenter
from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.body_mask import body_mask_of
from cldf_dist.data.readers.new_scans import ScanKind, find_scans
from cldf_dist.data.readers.phantom import CHANNELS, PhantomSettings, phantom_patient

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
ONE_CHANNEL = ScanKind(Data(dataset="nnunet", root="gone"), ("t2",), hounsfield=False)
TWO_CHANNELS = dataclasses.replace(ONE_CHANNEL, channels=("t1", "t2"))


def phantom_image(index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A patient that no run has seen: (4, x, y, slices) and the affine."""
    settings = PhantomSettings(num_patients=40, num_slices=5, grid_size=40)
    image, _, affine = phantom_patient(index, settings)
    return image.astype(np.float32), affine


def write_brats(folder: Path, index: int) -> Path:
    image, affine = phantom_image(index)
    for channel, values in zip(CHANNELS, image):
        write_nifti(folder / f"{folder.name}_{channel}.nii.gz", values, affine)
    return folder


def write_numbered(folder: Path, case: str, index: int) -> list[Path]:
    image, affine = phantom_image(index)
    paths = [folder / f"{case}_{number:04d}.nii.gz" for number in range(4)]
    for path, values in zip(paths, image):
        write_nifti(path, values, affine)
    return paths


def small_scan(path: Path) -> Path:
    write_nifti(path, np.ones((4, 5, 3), np.float32), AFFINE)
    return path


def test_every_form_of_the_same_scan_gives_the_same_mask(debug_run: Any, tmp_path: Path) -> None:
    segmenter = load_segmenter(debug_run.folder)
    assert segmenter.channels == CHANNELS
    image, affine = phantom_image(33)
    expected = segmenter.segment_array(image, affine, name="scan")
    assert expected.mask.shape == image.shape[1:]
    assert expected.mask.any()
    assert not expected.mask.all()
    folder = write_brats(tmp_path / "brats" / "scan", 33)
    files = write_numbered(tmp_path / "numbered", "scan", 33)
    for path in (folder, folder.parent, folder / "scan_t1.nii.gz", files[2], files[0].parent):
        found = segmenter.segment(path)
        assert found.name == "scan"
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_array_equal(found.probability, expected.probability)
    saved = found.save(tmp_path / "out")
    assert saved == [tmp_path / "out" / "scan_mask.nii.gz"]
    assert sorted(p.name for p in saved[0].parent.iterdir()) == [
        "scan_mask.nii.gz",
        "scan_probability.nii.gz",
    ]
    values, written = read_nifti(saved[0])
    np.testing.assert_array_equal(values > 0, expected.mask)
    np.testing.assert_allclose(written, affine, atol=1e-4)


def test_a_scan_may_have_any_file_name(debug_run: Any, tmp_path: Path) -> None:
    name = "Häuptling, scan no. 1 " + "x" * 60
    write_numbered(tmp_path / "in", name, 33)
    saved = load_segmenter(debug_run.folder).segment(tmp_path / "in").save(tmp_path / "out")
    assert saved == [tmp_path / "out" / f"{name}_mask.nii.gz"]
    assert saved[0].is_file()


def test_scans_are_found_at_any_depth(tmp_path: Path) -> None:
    small_scan(tmp_path / "a" / "b" / "ann.nii.gz")
    small_scan(tmp_path / "c" / "bob.nii.gz")
    small_scan(tmp_path / "c" / "below" / "not_looked_for.nii.gz")
    assert [scan.name for scan in find_scans(tmp_path, ONE_CHANNEL)] == ["ann", "bob"]


def test_several_scans_are_segmented_one_by_one(debug_run: Any, tmp_path: Path) -> None:
    segmenter = load_segmenter(debug_run.folder, batch_size=3)
    for name, index in (("ann", 31), ("bob", 32)):
        write_brats(tmp_path / name, index)
    assert [found.name for found in segmenter.segment_all(tmp_path)] == ["ann", "bob"]
    with pytest.raises(ValueError, match=r"holds 2 scans \(ann, bob\); use segment_all"):
        segmenter.segment(tmp_path)


def test_slices_that_the_classifier_calls_negative_are_emptied_on_request(debug_run: Any) -> None:
    image, affine = phantom_image(34)

    def segment(gate: float) -> Segmentation:
        """With a threshold that takes every pixel of the subject: the gate alone decides."""
        segmenter = load_segmenter(debug_run.folder, gate_probability=gate)
        return dataclasses.replace(segmenter, threshold=-1.0).segment_array(image, affine)

    everywhere = segment(0.0)
    certain = everywhere.slice_probability
    known = np.isfinite(certain)
    assert known.any()
    gate = float(np.median(certain[known]))
    gated = segment(gate)
    passed = known & (certain >= gate)
    assert 0 < passed.sum() < known.sum()
    np.testing.assert_array_equal(gated.mask[..., passed], everywhere.mask[..., passed])
    assert not gated.mask[..., ~passed].any()
    assert everywhere.mask[..., known].any(axis=(0, 1)).all(), "the gate had something to empty"
    for wrong, said in (({"gate_probability": 1.0}, "gate"), ({"min_component_ml": -1}, "min_c")):
        with pytest.raises(ValueError, match=f"segment.{said}"):
            load_segmenter(debug_run.folder, **wrong)


def test_the_package_alone_imports_no_torch(start: Any) -> None:
    words = (
        "import sys, cldf_dist; print('torch' in sys.modules, 'load_segmenter' in dir(cldf_dist))"
    )
    process = start("-c", words)
    assert process.communicate()[0].split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        cldf_dist.no_such_name  # noqa: B018


def test_a_run_may_be_named_from_inside_its_folder(
    debug_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(debug_run.folder)
    assert load_segmenter(".").channels == CHANNELS


def test_the_folder_of_several_runs_names_them(tmp_path: Path) -> None:
    for name in ("liver", "spleen"):
        (tmp_path / "study" / name / "segment").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"name one of its runs: .*/liver, .*/spleen"):
        load_segmenter(tmp_path / "study")


def test_a_run_that_is_not_finished_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no segment stage; run: cldf run CONFIG"):
        load_segmenter(tmp_path)


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        ((3, 8, 8, 4), 1.0, r"channels flair, t1, t1ce, t2, got shape \(3, 8, 8, 4\)"),
        ((8, 8, 4), 1.0, "must be .channels, x, y, slices."),
        ((4, 8, 8, 4), np.nan, "must be finite numbers"),
        ((4, 8, 8, 4), 0.0, "scan: the scan is empty"),
    ],
)
def test_unfit_arrays_are_refused(
    debug_run: Any, shape: tuple[int, ...], value: float, said: str
) -> None:
    segmenter = load_segmenter(debug_run.folder)
    with pytest.raises(ValueError, match=said):
        segmenter.segment_array(np.full(shape, value), AFFINE)
    image, _ = phantom_image(33)
    with pytest.raises(ValueError, match="scan: the affine does not describe a grid"):
        segmenter.segment_array(image, np.zeros((4, 4)))


def test_one_channel_scans_may_have_any_name(tmp_path: Path) -> None:
    for name in ("ann.nii.gz", "bob_0000.nii.gz", "c.d.nii.gz"):
        small_scan(tmp_path / name)
    small_scan(tmp_path / "hidden" / ".dan.nii.gz")
    scans = find_scans(tmp_path, ONE_CHANNEL)
    assert [scan.name for scan in scans] == ["ann", "bob", "c.d"]
    (only,) = find_scans(tmp_path / "c.d.nii.gz", ONE_CHANNEL)
    volume = only.read()
    assert volume.image.shape == (1, 4, 5, 3)
    assert volume.sources == (str(tmp_path / "c.d.nii.gz"),)
    assert volume.mask is None


def test_what_is_no_scan_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        find_scans(tmp_path / "absent", ONE_CHANNEL)
    with pytest.raises(ValueError, match="holds no scan; expected one NIfTI file, "):
        find_scans(tmp_path, ONE_CHANNEL)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a NIfTI file .* nor a DICOM file"):
        find_scans(tmp_path / "notes.txt", ONE_CHANNEL)
    brats = ScanKind(Data(dataset="brats"), CHANNELS, hounsfield=False)
    with pytest.raises(ValueError, match=r"_0000\.nii\.gz to <case>_0003\.nii\.gz"):
        find_scans(tmp_path, brats)


def test_a_missing_or_surplus_channel_is_named_when_that_scan_is_read(tmp_path: Path) -> None:
    for name in ("ann_0000", "bob_0000", "bob_0001", "cid_0000", "cid_0001", "cid_0002"):
        small_scan(tmp_path / f"{name}.nii.gz")
    ann, bob, cid = find_scans(tmp_path, TWO_CHANNELS)
    assert bob.read().image.shape == (2, 4, 5, 3)
    with pytest.raises(FileNotFoundError, match=r"has no ann_0001\.nii\.gz, the channel t2"):
        ann.read()
    with pytest.raises(ValueError, match=r"cid_0002\.nii\.gz is one channel too many.*t1, t2"):
        cid.read()
    odd = small_scan(tmp_path / "other" / "ann.nii.gz")
    with pytest.raises(ValueError, match=r"ann\.nii\.gz: the run's scans have 2 channels"):
        find_scans(odd, TWO_CHANNELS)


def test_scans_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        small_scan(tmp_path / folder / "ann.nii.gz")
    names = [scan.name for scan in find_scans(tmp_path, ONE_CHANNEL)]
    assert names == ["first_ann", "second_ann"]


def test_numbered_scans_of_one_channel_are_scans_of_their_own(tmp_path: Path) -> None:
    for number in (0, 1, 7):
        small_scan(tmp_path / f"scan_{number:04d}.nii.gz")
    names = [scan.name for scan in find_scans(tmp_path, ONE_CHANNEL)]
    assert names == ["scan_0000", "scan_0001", "scan_0007"]
    (one,) = find_scans(tmp_path / "scan_0007.nii.gz", ONE_CHANNEL)
    assert one.read().sources == (str(tmp_path / "scan_0007.nii.gz"),)


def test_masks_and_outputs_beside_scans_are_not_taken_for_scans(tmp_path: Path) -> None:
    small_scan(tmp_path / "imagesTs" / "ann_0000.nii.gz")
    for name in ("ann_mask", "ann_probability", "ann_labels", "mask", "ann-seg", "SEG"):
        small_scan(tmp_path / "imagesTs" / f"{name}.nii.gz")
    small_scan(tmp_path / "labelsTr" / "ann.nii.gz")
    small_scan(tmp_path / "out" / "liver" / "ann.nii.gz")
    (scan,) = find_scans(tmp_path, ONE_CHANNEL, leave_out=tmp_path / "out")
    assert scan.name == "ann"
    (asked_for,) = find_scans(tmp_path / "imagesTs" / "ann_mask.nii.gz", ONE_CHANNEL)
    assert asked_for.name == "ann_mask"


def test_a_link_is_named_by_itself_not_by_its_target(tmp_path: Path) -> None:
    target = small_scan(tmp_path / "store" / "sha256-abc.nii.gz")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ann.nii.gz").symlink_to(target)
    assert [scan.name for scan in find_scans(tmp_path / "in", ONE_CHANNEL)] == ["ann"]
    (one,) = find_scans(tmp_path / "in" / "ann.nii.gz", ONE_CHANNEL)
    assert one.name == "ann"


def test_an_output_that_cannot_be_kept_is_told_before_the_work(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = write_brats(tmp_path / "scans" / "ann", 31).parent
    (tmp_path / "file").write_text("here")
    for output, said in (
        (tmp_path / "file", "must be a folder that can be written: "),
        (scans, "must not be the folder of the scans"),
    ):
        words = [*debug_run.words, f"input={scans}", f"output={output}"]
        assert main(["segment", *words]) == 1
        assert f"output={output} {said}" in capsys.readouterr().err
    assert sorted(path.name for path in scans.iterdir()) == ["ann"]


def test_the_subject_does_not_depend_on_the_scale_of_the_values() -> None:
    image, _ = phantom_image(33)
    expected = body_mask_of(image, "tissue")
    for scale in (1e-5, 1 / 1200, 7.0):
        np.testing.assert_array_equal(body_mask_of(image * np.float32(scale), "tissue"), expected)
