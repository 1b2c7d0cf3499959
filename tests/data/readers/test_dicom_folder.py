import dataclasses
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import save, series_datasets, uid, write_series

from cldf_dist.__main__ import main
from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import read_nifti
from cldf_dist.data.readers.datasets import (
    check_listing,
    patients,
    read_patient,
    source_fingerprint,
)
from cldf_dist.data.readers.dicom_folder import channels, objects, patient_files
from cldf_dist.data.slices import prepare_volume

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (24, 20, 5)
SPACING = (1.0, 1.0, 3.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def body(seed: int = 0, air: int = -1000) -> np.ndarray:
    """A block of tissue in air."""
    image = np.full(SHAPE, air, np.int16)
    rng = np.random.default_rng(seed)
    image[4:-4, 4:-4] = rng.integers(20, 120, (SHAPE[0] - 8, SHAPE[1] - 8, SHAPE[2]))
    return image


def ct(folder: Path, seed: int = 0, **changes: object) -> list[Path]:
    description = {"spacing": SPACING, "modality": "CT", "patient": "Secret", **changes}
    return write_series(folder, body(seed), **description)  # type: ignore[arg-type]


def mr(folder: Path, seed: int = 0, **changes: object) -> list[Path]:
    description = {"spacing": SPACING, "modality": "MR", "series": folder.name, **changes}
    return write_series(folder, body(seed, air=0), **description)  # type: ignore[arg-type]


def write_mask(path: Path, affine: np.ndarray, axes: str = "") -> np.ndarray:
    """An object in slices 1 and 2 of the series; `axes` are those of the file."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:10, 5:9, 1:3] = 1
    image = nib.Nifti1Image(mask, affine)
    if axes:
        start = nib.orientations.io_orientation(affine)
        end = nib.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    nib.save(image, path)
    return mask == 1


def settings_of(tmp_path: Path, text: str = "patient,lesion\n", **changes: object) -> Data:
    path = tmp_path / "labels.csv"
    if text.count("\n") == 1:
        text += "a,1\n"
    path.write_text(text)
    plain = Data(dataset="dicom", root=str(tmp_path / "scans"), labels=str(path), image_size=16)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_one_series_is_a_channel_of_its_modality(tmp_path: Path) -> None:
    files = ct(tmp_path / "scans" / "a")
    settings = settings_of(tmp_path)
    assert channels(settings) == ("ct",)
    assert objects(settings) == ("lesion",)
    assert patients(settings) == ["a"]
    check_listing(settings, ["a"])
    volume = read_patient(settings, "a")
    np.testing.assert_array_equal(volume.image, body()[None])
    assert volume.image.dtype == np.int16
    assert volume.hounsfield
    assert volume.mask is None
    assert volume.body_mask[10, 10].all()
    assert not volume.body_mask[0].any()
    assert volume.spacing == SPACING
    assert volume.sources == (str(tmp_path / "scans" / "a"),)
    assert volume.dicom_files == tuple(files)
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [1] * 5


def test_a_series_may_lie_at_any_depth(tmp_path: Path) -> None:
    """As on a disc from a hospital; what systems leave behind does not count."""
    ct(tmp_path / "scans" / "a" / "DICOM" / "PA0" / "SE1", name="IM{}".format)
    mr(tmp_path / "scans" / "a" / "__MACOSX" / "PA0")
    mr(tmp_path / "scans" / "a" / "DICOM" / ".Trashes")
    (tmp_path / "scans" / "a" / "DICOM" / ".DS_Store").write_bytes(b"left behind")
    (tmp_path / "scans" / "a" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "scans" / "notes").mkdir()
    (tmp_path / "scans" / "readme.txt").write_text("none")
    settings = settings_of(tmp_path)
    assert patients(settings) == ["a"]
    assert channels(settings) == ("ct",)
    assert read_patient(settings, "a").image.shape == (1, *SHAPE)


def test_sub_folders_are_channels(tmp_path: Path) -> None:
    for number, patient in enumerate(("b", "a")):
        for seed, channel in enumerate(("t2", "t1")):
            mr(tmp_path / "scans" / patient / channel, 10 * number + seed)
    settings = settings_of(tmp_path)
    assert patients(settings) == ["a", "b"]
    assert channels(settings) == ("t1", "t2")
    check_listing(settings, ["a", "b"])
    volume = read_patient(settings, "a")
    np.testing.assert_array_equal(volume.image, np.stack([body(11, air=0), body(10, air=0)]))
    assert not volume.hounsfield
    np.testing.assert_array_equal(volume.body_mask, body(air=0) > 0)  # nothing but 0 around it
    assert [Path(source).name for source in volume.sources] == ["t1", "t2"]


def test_channels_that_differ_are_told_before_any_pixel_is_read(tmp_path: Path) -> None:
    for patient, names in (("a", ("t1", "t2")), ("b", ("t1", "T2")), ("c", ("t1",))):
        for name in names:
            mr(tmp_path / "scans" / patient / name)
    settings = settings_of(tmp_path)
    with pytest.raises(ValueError, match="2 faults: ") as caught:
        check_listing(settings, patients(settings))
    assert "scans/b has the channels T2, t1, other patients have t1, t2; every" in str(caught.value)
    assert "scans/c has the channels mr, other patients have t1, t2; every" in str(caught.value)
    with pytest.raises(ValueError, match="scans/b has the channels"):
        read_patient(settings, "b")


def test_another_modality_is_another_channel(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    mr(tmp_path / "scans" / "b")
    with pytest.raises(ValueError, match="scans/b has the channels mr, other patients have ct"):
        check_listing(settings_of(tmp_path), ["a", "b"])
    datasets = series_datasets(body(), spacing=SPACING, Modality=None)
    (tmp_path / "scans" / "c").mkdir()
    save(tmp_path / "scans" / "c" / "1.dcm", datasets[0])
    with pytest.raises(ValueError, match=r"c/1\.dcm: Modality is missing; it names the channel"):
        check_listing(settings_of(tmp_path), ["c"])


def test_several_series_in_one_folder_are_told(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    for name in ("2", "3"):
        ct(tmp_path / "scans" / "a" / name, 1, series=name)
    with pytest.raises(ValueError, match=r"scans/a holds 3 series"):
        read_patient(settings_of(tmp_path), "a")


def test_channels_on_different_grids_are_told(tmp_path: Path) -> None:
    mr(tmp_path / "scans" / "a" / "t1")
    mr(tmp_path / "scans" / "a" / "t2", origin=(0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"a/t1 and .*a/t2 must have the same affine"):
        read_patient(settings_of(tmp_path), "a")


def test_folders_without_series_tell_the_layout(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data\.root is not a folder: .*scans; expected"):
        patients(settings)
    (tmp_path / "scans" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"scans holds no folders with DICOM files; expected <ro"):
        channels(settings)
    ct(tmp_path / "scans" / "a")
    with pytest.raises(ValueError, match=r"data\.labels must name the CSV file of labels"):
        patients(dataclasses.replace(settings, labels=""))


@pytest.mark.parametrize(
    "names",
    [
        ["001.dcm", "003.dcm"],
        ["001", "003"],
        ["series/001.dcm", "series/003"],
        [uid("Secret", "CT", "1", "1"), uid("Secret", "CT", "1", "3")],
        ["001", uid("Secret", "CT", "1", "3")],
    ],
)
def test_slices_go_by_file_or_uid(tmp_path: Path, names: list[str]) -> None:
    ct(tmp_path / "scans" / "a" / "series")
    text = f"patient,slice,lesion\na,{names[0]},1\na,{names[1]},0\n"
    volume = read_patient(settings_of(tmp_path, text), "a")
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [-2, 1, -2, 0, -2]


def test_slice_names_follow_the_place_not_the_order_of_names(tmp_path: Path) -> None:
    """Files that are numbered from the head down, as many scanners do."""
    ct(tmp_path / "scans" / "a", name=lambda index: f"{4 - index}")
    settings = settings_of(tmp_path, "patient,slice,lesion\na,0,1\na,1,0\n")
    volume = read_patient(settings, "a")
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [-2, -2, -2, 0, 1]
    slices, _ = prepare_volume(volume, settings)
    assert [item.label for item in slices] == [-2, -2, -2, 0, 1]


def test_files_called_by_their_uid_keep_their_whole_name(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a", name=lambda index: "1" + index * ".2")
    settings = settings_of(tmp_path, "patient,slice,lesion\na,1.2.2,1\n")
    volume = read_patient(settings, "a")
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [-2, -2, 1, -2, -2]


def test_a_slice_of_several_channels_goes_by_any_of_its_files(tmp_path: Path) -> None:
    mr(tmp_path / "scans" / "a" / "t1", name="x{}.dcm".format)
    mr(tmp_path / "scans" / "a" / "t2", name=lambda index: f"x{4 - index}.dcm")
    settings = settings_of(tmp_path, "patient,slice,lesion\na,t1/x0,1\na,t2/x0.dcm,0\n")
    volume = read_patient(settings, "a")
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [1, -2, -2, -2, 0]
    for name, said in (("x0", "has 2 slices that go by 'x0'"), ("x9", "has no slice 'x9'; its 5")):
        settings = settings_of(tmp_path, f"patient,slice,lesion\na,{name},1\n")
        with pytest.raises(ValueError, match=rf"labels\.csv, line 2: patient a {said}"):
            read_patient(settings, "a")


def test_a_sagittal_series_takes_labels_of_the_volume_alone(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a", orientation=SAGITTAL)
    volume = read_patient(settings_of(tmp_path), "a")
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [1] * SHAPE[1]  # the rows run down
    settings = settings_of(tmp_path, "patient,slice,lesion\na,001,1\n")
    with pytest.raises(ValueError, match=r"scans/a: .*labels\.csv labels slices by file.* axial"):
        read_patient(settings, "a")


@pytest.mark.parametrize("axes", ["", "RAS", "LPS", "ASL"])
@pytest.mark.parametrize("ending", ["nii.gz", "nii"])
def test_a_mask_is_turned_to_the_grid_of_the_series(tmp_path: Path, axes: str, ending: str) -> None:
    ct(tmp_path / "scans" / "a", origin=(-7.0, 5.0, 11.0))
    settings = settings_of(tmp_path)
    affine = read_patient(settings, "a").affine
    expected = write_mask(tmp_path / "scans" / "a" / f"mask.{ending}", affine, axes)
    mask = read_patient(settings, "a").mask
    assert mask is not None
    np.testing.assert_array_equal(mask, expected)


def test_a_mask_on_another_grid_is_told(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    settings = settings_of(tmp_path)
    affine = read_patient(settings, "a").affine
    for change in (np.diag([1.0, 1.0, 1.1, 1.0]), np.diag([-1.0, 1.0, 1.0, 1.0])):
        write_mask(tmp_path / "scans" / "a" / "mask.nii.gz", affine @ change)
        with pytest.raises(ValueError, match=r"scans/a and .*mask\.nii\.gz must have the same aff"):
            read_patient(settings, "a")


def test_a_mask_of_other_values_is_told(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    settings = settings_of(tmp_path)
    image = nib.Nifti1Image(np.full(SHAPE, 255, np.uint8), read_patient(settings, "a").affine)
    nib.save(image, tmp_path / "scans" / "a" / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask\.nii\.gz: labels must be one of \[0, 1\], found"):
        read_patient(settings, "a")
    (tmp_path / "scans" / "a" / "mask.nii").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more than one mask: mask\.nii\.gz, mask\.nii; keep one"):
        check_listing(settings, ["a"])


def test_a_mask_is_of_the_only_object(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    settings = settings_of(tmp_path, "patient,liver,spleen\na,1,0\n", object="liver")
    assert patients(settings) == ["a"]
    (tmp_path / "scans" / "a" / "mask.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a/mask\.nii\.gz: which of liver, spleen in .*labels\.c"):
        patients(settings)


def test_faults_of_the_labels_are_told_before_anything_is_read(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    with pytest.raises(ValueError, match=r"labels\.csv: not in the data: 'b' \(line 3\)"):
        patients(settings_of(tmp_path, "patient,lesion\na,1\nb,0\n"))
    with pytest.raises(ValueError, match=r"labels\.csv: data\.object must be one of lesion"):
        patients(settings_of(tmp_path, object="liver"))


def test_a_fingerprint_follows_files_labels_and_mask(tmp_path: Path) -> None:
    ct(tmp_path / "scans" / "a")
    (tmp_path / "scans" / "a" / "mask.nii.gz").write_bytes(b"")
    settings = settings_of(tmp_path)
    files = patient_files(settings, "a")
    assert {file.name for file in files} == {
        "labels.csv",
        "mask.nii.gz",
        *(f"{index:03d}.dcm" for index in range(5)),
    }
    seen = {source_fingerprint(settings, "a")}
    for file in files:
        os.utime(file, ns=(1, 1))
        seen.add(source_fingerprint(settings, "a"))
    assert len(seen) == 1 + len(files)


def test_prepared_series_hold_labels_masks_and_nothing_about_the_person(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate("abcd"):
        files = ct(tmp_path / "scans" / name, number, name=f"{name}{{}}.dcm".format)
        rows += [f"{name},{name}1,1", f"{name},{name}2,1", f"{name},{name}4,0"]
        rows += [f"{name},{name}0,"] * (number == 0)
    settings = settings_of(tmp_path, "\n".join(["patient,slice,lesion", *rows]) + "\n")
    truth = write_mask(
        tmp_path / "scans" / "d" / "mask.nii.gz", read_patient(settings, "d").affine, "RAS"
    )
    splits = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    words = [f"data.{key}={getattr(settings, key)}" for key in ("dataset", "root", "labels")]
    words += [f"runs={tmp_path}", f"data.splits={tmp_path / 'splits.json'}"]
    debug = str(ROOT / "configs" / "debug.yaml")
    assert main(["prepare", debug, *words, "tracking.enabled=false", "name=x"]) == 0
    folder = tmp_path / "x" / "prepare"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["channels"] == ["ct"]
    labels = {shard["split"]: shard["label_counts"] for shard in manifest["shards"]}
    assert labels["train"] == {"-2": 4, "0": 2, "1": 4}
    np.testing.assert_array_equal(read_nifti(folder / "truth" / "d.nii.gz")[0] == 1, truth)
    written = [path for path in sorted((tmp_path / "x").rglob("*")) if path.is_file()]
    assert len(written) > 4
    for path in written:
        assert b"Secret" not in path.read_bytes(), path
        assert str(uid("Secret")).encode() not in path.read_bytes(), path
    assert b"Secret" in files[0].read_bytes()  # it was there to be found
