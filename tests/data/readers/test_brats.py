import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.config import Data
from cldf_dist.data.readers.brats import (
    CHANNELS,
    brats_patients,
    listing_faults,
    patient_files,
    read_patient,
    read_scan,
)

AFFINE = np.diag([-1.0, -1.0, 4.0, 1.0])
SHAPE = (6, 5, 4)
NAMES = {
    2021: {"flair": "_flair", "t1": "_t1", "t1ce": "_t1ce", "t2": "_t2", "seg": "_seg"},
    2023: {"flair": "-t2f", "t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "seg": "-seg"},
}


def development_data() -> Path:
    default = Path(__file__).parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("CLDF_DATA", default))
    if not (folder / "brats2021").is_dir():
        pytest.skip(f"no development data: set CLDF_DATA to its folder ({folder} has no brats2021)")
    return folder


def labels(*values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array.flat[: len(values)] = values
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_patient(
    root: Path, patient: str, year: int = 2021, suffix: str = ".nii.gz", seg: bool = True
) -> Path:
    """Channel number c has the value c + 1 everywhere but in the last slice."""
    folder = root / patient
    for number, channel in enumerate(CHANNELS):
        scan = np.full(SHAPE, number + 1, np.int16)
        scan[:, :, -1] = 0
        save(folder / f"{patient}{NAMES[year][channel]}{suffix}", scan)
    if seg:
        save(
            folder / f"{patient}{NAMES[year]['seg']}{suffix}",
            labels(1, 2, 4 if year == 2021 else 3),
        )
    return folder


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("year", [2021, 2023])
def test_both_naming_schemes_give_the_same_volume(tmp_path: Path, year: int, suffix: str) -> None:
    make_patient(tmp_path, "case_1", year, suffix)
    volume = read_scan(tmp_path / "case_1", Data())
    assert volume.patient == "case_1"
    assert volume.image.shape == (4, *SHAPE)
    assert volume.image.dtype == np.int16
    assert volume.image[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert volume.body_mask[:, :, :-1].all()
    assert not volume.body_mask[:, :, -1].any()
    assert volume.mask is not None
    assert int(volume.mask.sum()) == 3
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.spacing == (1, 1, 4)


def test_patients_are_the_sorted_folders_with_scans(tmp_path: Path) -> None:
    for patient in ("case_2", "case_1"):
        make_patient(tmp_path, patient)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("none")
    assert brats_patients(tmp_path) == ["case_1", "case_2"]


def test_faults_of_a_listing_are_told_without_opening_a_file(tmp_path: Path) -> None:
    data = Data(root=str(tmp_path))
    make_patient(tmp_path, "whole")
    make_patient(tmp_path, "no_mask", seg=False)
    assert listing_faults(data, "whole") == []
    assert listing_faults(data, "no_mask") == []
    folder = make_patient(tmp_path, "odd")
    (folder / "odd_t1.nii.gz").unlink()
    (folder / "odd_t2.nii").write_bytes(b"not a scan")
    (folder / "again_seg.nii").write_bytes(b"not a scan")
    missing, doubled_scan, doubled_mask = listing_faults(data, "odd")
    assert "odd has no t1 scan; expected *_t1.nii.gz" in missing
    assert "more than one t2 file: odd_t2.nii, odd_t2.nii.gz; keep one" in doubled_scan
    assert "more than one seg file" in doubled_mask


def test_the_files_of_a_patient_are_the_scans_and_the_mask(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1")
    (folder / "notes.txt").write_text("none")
    names = [f"case_1_{kind}.nii.gz" for kind in (*CHANNELS, "seg")]
    assert [file.name for file in patient_files(Data(root=str(tmp_path)), "case_1")] == names


def test_folder_without_scans_tells_the_expected_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no BraTS scans; expected <root>/<patient>"):
        brats_patients(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent; expected <root>/<patient>"):
        brats_patients(tmp_path / "absent")


def test_scan_without_segmentation_has_no_mask(tmp_path: Path) -> None:
    make_patient(tmp_path, "case_1", seg=False)
    assert read_scan(tmp_path / "case_1", Data()).mask is None


def test_segmentation_is_not_opened_unless_asked_for(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1")
    (folder / "case_1_seg.nii.gz").write_bytes(b"damaged")
    assert read_scan(tmp_path / "case_1", Data(), with_mask=False).mask is None
    with pytest.raises(ValueError, match=r"case_1_seg\.nii\.gz is truncated or damaged"):
        read_scan(tmp_path / "case_1", Data())


def test_new_scan_may_lie_in_a_folder_of_another_name(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1").rename(tmp_path / "new_scan")
    (folder / "._case_1_t1.nii.gz").write_bytes(b"left behind by another system")
    assert read_scan(folder, Data()).patient == "new_scan"


@pytest.mark.parametrize("channel", CHANNELS)
def test_missing_modality_is_named(tmp_path: Path, channel: str) -> None:
    folder = make_patient(tmp_path, "case_1")
    (folder / f"case_1_{channel}.nii.gz").unlink()
    assert brats_patients(tmp_path) == ["case_1"]
    with pytest.raises(FileNotFoundError, match=rf"case_1 has no {channel} scan"):
        read_scan(tmp_path / "case_1", Data())


def test_two_files_of_one_modality_are_named(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1")
    save(folder / "case_1-t1n.nii.gz", np.ones(SHAPE, np.int16))
    with pytest.raises(ValueError, match=r"case_1-t1n\.nii\.gz, case_1_t1\.nii\.gz; keep one"):
        read_scan(tmp_path / "case_1", Data())


@pytest.mark.parametrize("kind", ["t2", "seg"])
def test_other_shape_names_both_files(tmp_path: Path, kind: str) -> None:
    folder = make_patient(tmp_path, "case_1")
    save(folder / f"case_1_{kind}.nii.gz", np.ones((6, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"case_1_flair.*case_1_{kind}\.nii\.gz.*same shape"):
        read_scan(tmp_path / "case_1", Data())


@pytest.mark.parametrize("kind", ["t1ce", "seg"])
def test_other_affine_names_both_files(tmp_path: Path, kind: str) -> None:
    folder = make_patient(tmp_path, "case_1")
    moved = AFFINE.copy()
    moved[2, 3] = 4
    save(folder / f"case_1_{kind}.nii.gz", np.ones(SHAPE, np.uint8), moved)
    with pytest.raises(ValueError, match=rf"case_1_flair.*case_1_{kind}\.nii\.gz.*same affine"):
        read_scan(tmp_path / "case_1", Data())


def test_truncated_scan_is_named(tmp_path: Path) -> None:
    path = make_patient(tmp_path, "case_1") / "case_1_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"case_1_t2\.nii\.gz is truncated or damaged"):
        read_scan(tmp_path / "case_1", Data())


def test_labels_saved_as_scaled_floats_are_rounded(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1")
    image = nib.Nifti1Image(labels(1, 2, 4).astype(np.float64), AFFINE)
    image.set_data_dtype(np.uint8)
    nib.save(image, folder / "case_1_seg.nii.gz")
    stored = np.asanyarray(nib.load(folder / "case_1_seg.nii.gz").dataobj)
    assert 4 < stored.max() < 4.001  # the trap is set
    mask = read_scan(tmp_path / "case_1", Data()).mask
    assert mask is not None
    np.testing.assert_array_equal(mask, labels(1, 2, 4) > 0)


@pytest.mark.parametrize("value", [5, 0.5, -1])
def test_unknown_label_is_named(tmp_path: Path, value: float) -> None:
    folder = make_patient(tmp_path, "case_1")
    array = labels(1, 2, 4).astype(np.float32)
    array[-1, -1, -1] = value
    save(folder / "case_1_seg.nii.gz", array)
    with pytest.raises(ValueError, match=rf"case_1_seg\.nii\.gz: labels must be.*found \[{value}"):
        read_scan(tmp_path / "case_1", Data())


@pytest.mark.parametrize(
    ("year", "stored", "other", "voxels"),
    [
        (2021, (1, 2, 4), 3, {"": 3, "whole_tumour": 3, "tumour_core": 2, "enhancing_tumour": 1}),
        (2023, (1, 2, 3), 4, {"": 3, "whole_tumour": 3, "tumour_core": 2, "enhancing_tumour": 1}),
    ],
)
def test_the_object_is_named_and_labels_of_another_year_are_refused(
    tmp_path: Path, year: int, stored: tuple[int, ...], other: int, voxels: dict[str, int]
) -> None:
    folder = make_patient(tmp_path, "case_1", year)
    file = folder / f"case_1{NAMES[year]['seg']}.nii.gz"
    save(file, labels(*stored))
    for name, count in voxels.items():
        mask = read_patient(Data(root=str(tmp_path), object=name), "case_1").mask
        assert mask is not None
        assert int(mask.sum()) == count
    save(file, labels(*stored, other))
    with pytest.raises(ValueError, match=rf"labels must be one of .*found \[{other}"):
        read_scan(folder, Data())


def test_channels_that_16_bits_cannot_hold_become_float32(tmp_path: Path) -> None:
    folder = make_patient(tmp_path, "case_1")
    save(folder / "case_1_t1.nii.gz", np.full(SHAPE, 40000, np.uint16))
    volume = read_scan(tmp_path / "case_1", Data())
    assert volume.image.dtype == np.float32
    assert volume.image[1].max() == 40000


def test_development_data_is_read() -> None:
    root = development_data() / "brats2021"
    patients = brats_patients(root)
    assert len(patients) == 24
    volume = read_scan(root / patients[0], Data())
    assert volume.image.shape == (4, 240, 240, 32)
    assert volume.mask is not None
    assert not (volume.mask & ~volume.body_mask).any()
