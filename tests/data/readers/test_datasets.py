import dataclasses
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.config import Data, Phantom
from cldf_dist.data.readers.body_mask import bright_body_mask
from cldf_dist.data.readers.datasets import (
    channels,
    check_listing,
    patients,
    read_patient,
    source_fingerprint,
)
from cldf_dist.data.slices import body_mask, prepare_volume

PHANTOM = Data(
    dataset="phantom",
    image_size=32,
    min_object_pixels=5,
    phantom=Phantom(num_patients=3, num_slices=8, grid_size=32),
)


def test_phantom_patients_are_named_and_read() -> None:
    assert patients(PHANTOM) == ["phantom_000", "phantom_001", "phantom_002"]
    assert channels(PHANTOM) == ("flair", "t1", "t1ce", "t2")
    volume = read_patient(PHANTOM, "phantom_001")
    assert volume.patient == "phantom_001"
    assert volume.image.shape == (4, 32, 32, 8)
    assert volume.mask is not None
    assert volume.mask.dtype == np.bool_


def test_phantom_subject_holds_the_object_and_leaves_the_air() -> None:
    for patient in patients(PHANTOM):
        volume = read_patient(PHANTOM, patient)
        assert volume.mask is not None
        assert not (volume.mask & ~volume.body_mask).any()
        assert 0.2 < volume.body_mask.mean() < 0.7
        assert not volume.body_mask[0, 0].any()
        slices, _ = prepare_volume(volume, PHANTOM)
        assert all(body_mask(item.image).any() for item in slices)


def test_subject_is_the_largest_part_without_holes() -> None:
    image = np.zeros((1, 40, 40, 3), np.int16)
    image[0, 5:30, 5:30] = 1000
    image[0, 12:20, 12:20] = 0
    image[0, 34:38, 34:38] = 1000
    mask = bright_body_mask(image)
    assert mask[15, 15].all()
    assert not mask[34:38, 34:38].any()
    assert 25**2 <= mask[:, :, 1].sum() <= 27**2  # at most a pixel of blur around it


def test_brats_patients_are_read_from_the_root(tmp_path: Path) -> None:
    settings = Data(dataset="brats", root=str(tmp_path))
    for channel in channels(settings):
        path = tmp_path / "case_1" / f"case_1_{channel}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones((4, 4, 2), np.int16), np.eye(4)), path)
    assert patients(settings) == ["case_1"]
    assert read_patient(settings, "case_1").mask is None


def brats_folder(root: Path, patient: str, *kinds: str) -> Path:
    """A patient's folder of empty files: for what reads listings alone."""
    folder = root / patient
    folder.mkdir(parents=True)
    for kind in kinds:
        (folder / f"{patient}_{kind}.nii.gz").write_bytes(b"")
    return folder


def test_a_fingerprint_follows_the_source_files(tmp_path: Path) -> None:
    settings = Data(dataset="brats", root=str(tmp_path / "a"))
    folder = brats_folder(tmp_path / "a", "case_1", *channels(settings))
    seen = [source_fingerprint(settings, "case_1")]
    (folder / "notes.txt").write_text("no scan")
    assert source_fingerprint(settings, "case_1") == seen[0]

    mask = folder / "case_1_seg.nii.gz"
    mask.write_bytes(b"1")
    seen.append(source_fingerprint(settings, "case_1"))
    mask.write_bytes(b"12")
    os.utime(mask, ns=(1, 1))
    seen.append(source_fingerprint(settings, "case_1"))
    os.utime(mask, ns=(1, 2))
    seen.append(source_fingerprint(settings, "case_1"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    elsewhere = dataclasses.replace(settings, root=str(tmp_path / "b"))
    seen.append(source_fingerprint(elsewhere, "case_1"))
    assert len(set(seen)) == len(seen)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    linked = dataclasses.replace(settings, root=str(tmp_path / "link"))
    assert source_fingerprint(linked, "case_1") == seen[-1], "the resolved root counts"


def test_a_fingerprint_of_the_phantom_follows_its_settings() -> None:
    other = dataclasses.replace(PHANTOM, phantom=dataclasses.replace(PHANTOM.phantom, seed=1))
    same = dataclasses.replace(PHANTOM, image_size=64)
    assert source_fingerprint(PHANTOM, "phantom_001") == source_fingerprint(same, "phantom_001")
    assert source_fingerprint(PHANTOM, "phantom_001") != source_fingerprint(other, "phantom_001")
    assert source_fingerprint(PHANTOM, "phantom_001") != source_fingerprint(PHANTOM, "phantom_002")


def test_all_faults_of_a_listing_are_told_at_once(tmp_path: Path) -> None:
    settings = Data(dataset="brats", root=str(tmp_path))
    brats_folder(tmp_path, "whole", *channels(settings))
    check_listing(settings, patients(settings))
    check_listing(PHANTOM, patients(PHANTOM))
    brats_folder(tmp_path, "bad name", *channels(settings))
    for number in range(6):
        brats_folder(tmp_path, f"case_{number}", "flair", "t1", "t2")
    with pytest.raises(ValueError, match="the data has 7 faults: ") as caught:
        check_listing(settings, patients(settings))
    said = str(caught.value)
    assert "got 'bad name'; rename the folder" in said
    assert re.findall(r"case_\d has no t1ce scan", said) == [
        f"case_{number} has no t1ce scan" for number in range(4)
    ]
    assert said.endswith("; and 2 more")


def test_unknown_data_set_lists_the_known_ones() -> None:
    for ask in (patients, channels, lambda data: read_patient(data, "a")):
        with pytest.raises(
            ValueError, match=r"must be one of brats, chaos, dicom, nnunet, phantom; got 'mnist'"
        ):
            ask(Data(dataset="mnist"))


def test_missing_root_is_told() -> None:
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        patients(Data(dataset="brats"))


def test_unknown_phantom_patient_is_refused() -> None:
    with pytest.raises(ValueError, match="phantom_000 to phantom_002; got 'phantom_003'"):
        read_patient(PHANTOM, "phantom_003")
