import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.__main__ import main
from cldf_dist.config import Data, Phantom
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.brats import CHANNELS
from cldf_dist.data.readers.datasets import check_listing, read_patient, source_fingerprint
from cldf_dist.data.readers.nnunet import channels, objects, patient_files, patients
from cldf_dist.data.slices import prepare_volume

ROOT = Path(__file__).resolve().parents[3]
AFFINE = np.diag([-1.0, -1.0, 4.0, 1.0])
SHAPE = (6, 5, 4)
LABELS = {"background": 0, "liver": 1, "tumour": [2, 3]}
VERSION_1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scan(value: int = 100) -> np.ndarray:
    """Air around a subject that is brighter from slice to slice."""
    array = np.zeros(SHAPE, np.int16)
    array[1:-1, 1:-1] = value + np.arange(SHAPE[2])
    return array


def mask(*values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array.flat[: len(values)] = values
    return array


def describe(root: Path, **changes: Any) -> None:
    said = {"channel_names": {"0": "T2"}, "labels": LABELS, "file_ending": ".nii.gz", **changes}
    (root / "dataset.json").write_text(json.dumps(said))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cases of one channel; the second has no mask."""
    root = tmp_path / "Dataset001"
    for case in ("case_1", "case_2"):
        save(root / "imagesTr" / f"{case}_0000.nii.gz", scan())
    save(root / "labelsTr" / "case_1.nii.gz", mask(1, 2, 3))
    describe(root)
    return root


def settings_of(root: Path, name: str = "liver", **changes: Any) -> Data:
    return Data(dataset="nnunet", root=str(root), object=name, **changes)


def labels_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return str(path)


def test_a_case_is_read(folder: Path) -> None:
    settings = settings_of(folder)
    assert channels(settings) == ("T2",)
    assert objects(settings) == ("liver", "tumour")
    assert patients(settings) == ["case_1", "case_2"]
    check_listing(settings, patients(settings))
    volume = read_patient(settings, "case_1")
    assert volume.patient == "case_1"
    assert volume.image.shape == (1, *SHAPE)
    assert volume.image.dtype == np.int16
    assert volume.mask is not None
    np.testing.assert_array_equal(volume.mask, mask(1, 2, 3) == 1)
    np.testing.assert_array_equal(volume.body_mask, scan() > 0)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.sources[0].endswith("imagesTr/case_1_0000.nii.gz")
    assert not volume.hounsfield
    assert volume.slice_labels is None
    assert read_patient(settings, "case_2").mask is None


@pytest.mark.parametrize(
    ("name", "values"), [("liver", {1}), ("tumour", {2, 3}), ("liver+tumour", {1, 2, 3})]
)
def test_regions_and_joined_objects_are_their_labels(
    folder: Path, name: str, values: set[int]
) -> None:
    volume = read_patient(settings_of(folder, name), "case_1")
    assert volume.mask is not None
    np.testing.assert_array_equal(volume.mask, np.isin(mask(1, 2, 3), list(values)))


def test_the_only_label_is_the_object(folder: Path) -> None:
    describe(folder, labels={"background": 0, "lesion": [1, 2, 3]})
    volume = read_patient(settings_of(folder, ""), "case_1")
    assert volume.mask is not None
    assert int(volume.mask.sum()) == 3


@pytest.mark.parametrize("name", ["", "kidney"])
def test_other_objects_are_refused_with_the_known_ones(folder: Path, name: str) -> None:
    said = r"dataset\.json: data\.object must be one of liver, tumour"
    with pytest.raises(ValueError, match=said):
        patients(settings_of(folder, name))


def test_version_1_of_the_description_is_read(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps(VERSION_1))
    settings = settings_of(folder, "tumour")
    assert channels(settings) == ("CT",)
    assert objects(settings) == ("liver", "tumour")
    save(folder / "labelsTr" / "case_1.nii.gz", mask(1, 2, 2))
    volume = read_patient(settings, "case_1")
    assert volume.mask is not None
    assert int(volume.mask.sum()) == 2


@pytest.mark.parametrize(
    ("names", "hounsfield"),
    [(["CT"], True), (["ct"], True), (["CT", "ct"], True), (["CT", "PET"], False), (["T1"], False)],
)
def test_hounsfield_units_are_those_of_ct_alone(
    folder: Path, names: list[str], hounsfield: bool
) -> None:
    describe(folder, channel_names={str(number): name for number, name in enumerate(names)})
    for number in range(len(names)):
        save(folder / "imagesTr" / f"case_1_{number:04d}.nii.gz", scan(100 + number))
    volume = read_patient(settings_of(folder), "case_1")
    assert volume.hounsfield == hounsfield
    assert volume.image[:, 3, 3, 0].tolist() == [100 + number for number in range(len(names))]


def test_unpacked_files_are_read(folder: Path) -> None:
    describe(folder, file_ending=".nii")
    for path in sorted(folder.glob("*/*.nii.gz")):
        save(path.with_suffix(""), nib.load(path).dataobj[:])
        path.unlink()
    assert patients(settings_of(folder)) == ["case_1", "case_2"]
    assert read_patient(settings_of(folder), "case_1").mask is not None


def test_what_systems_leave_behind_and_other_folders_do_not_count(folder: Path) -> None:
    for name in ("imagesTr/.DS_Store", "imagesTr/._case_1_0000.nii.gz", "labelsTr/._case_1.nii.gz"):
        (folder / name).write_bytes(b"left behind by another system")
    save(folder / "imagesTs" / "case_9_0000.nii.gz", scan())
    (folder / "imagesTr" / "readme.txt").write_text("none")
    assert patients(settings_of(folder)) == ["case_1", "case_2"]


def test_odd_number_types_are_read(folder: Path) -> None:
    settings = settings_of(folder, "tumour")
    plain = read_patient(settings, "case_1")
    assert plain.mask is not None
    image = nib.Nifti1Image(scan()[..., None].astype(np.int64), AFFINE, dtype=np.int64)
    nib.save(image, folder / "imagesTr" / "case_1_0000.nii.gz")
    save(folder / "labelsTr" / "case_1.nii.gz", mask(1, 2, 3).astype(np.float64) * 1.00000006)
    odd = read_patient(settings, "case_1")
    assert odd.mask is not None
    np.testing.assert_array_equal(odd.mask, plain.mask)
    np.testing.assert_array_equal(odd.image, plain.image)


@pytest.mark.parametrize("value", [4, 0.5])
def test_a_label_that_is_not_declared_is_named(folder: Path, value: float) -> None:
    save(folder / "labelsTr" / "case_1.nii.gz", np.full(SHAPE, value, np.float32))
    said = rf"case_1\.nii\.gz: labels must be one of \[0, 1, 2, 3\], found \[{value}"
    with pytest.raises(ValueError, match=said):
        read_patient(settings_of(folder), "case_1")


@pytest.mark.parametrize("path", ["imagesTr/case_1_0001.nii.gz", "labelsTr/case_1.nii.gz"])
def test_other_grids_are_named(folder: Path, path: str) -> None:
    describe(folder, channel_names={"0": "T1", "1": "T2"})
    save(folder / "imagesTr" / "case_1_0001.nii.gz", scan())
    moved = AFFINE.copy()
    moved[2, 3] = 4
    save(folder / path, mask(), moved)
    with pytest.raises(ValueError, match=rf"case_1_0000\.nii\.gz and .*{path}.*the same affine"):
        read_patient(settings_of(folder), "case_1")


def test_missing_channels_are_told_before_anything_is_read(folder: Path) -> None:
    describe(folder, channel_names={"0": "T1", "1": "T2"})
    settings = settings_of(folder)
    save(folder / "imagesTr" / "case_1_0001.nii.gz", scan())
    said = r"1 fault: .*imagesTr/case_2_0001\.nii\.gz is missing: .*each of T1, T2"
    with pytest.raises(ValueError, match=said):
        check_listing(settings, patients(settings))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("imagesTr/case_3.nii.gz", r"must be called <case>_<channel>\.nii\.gz"),
        ("imagesTr/case_1_0001.nii.gz", r"must be .*, <channel> from 0000 to 0000 as"),
        ("imagesTr/case_3_0000.nii", r"must be called <case>_<channel>\.nii\.gz"),
        ("labelsTr/case_3.nii.gz", "belongs to no case of imagesTr; add the images or remove it"),
        ("labelsTr/case_2.nii", "belongs to no case of imagesTr"),
    ],
)
def test_files_that_belong_to_no_case_are_told(folder: Path, path: str, said: str) -> None:
    save(folder / path, mask())
    with pytest.raises(ValueError, match=rf"{path} {said}"):
        patients(settings_of(folder))


def test_only_the_first_faults_are_shown(folder: Path) -> None:
    for number in range(8):
        save(folder / "labelsTr" / f"other_{number}.nii.gz", mask())
    with pytest.raises(ValueError, match=r"other_4\.nii\.gz belongs to no.*; and 3 more$"):
        patients(settings_of(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file_ending": ".png"}, "file_ending must be .nii.gz or .nii, got '.png'; convert"),
        ({"channel_names": {}}, "channel_names must name at least one channel"),
        ({"channel_names": {"1": "T1"}}, "numbered from 0 without gaps, got {'1': 'T1'}"),
        ({"channel_names": ["T1"]}, "channel_names must be like"),
        ({"labels": ["liver"]}, "labels must be like"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "'ignore' is not supported"),
        ({"labels": {"0": "background", "1": "ignore"}}, "'ignore' is not supported"),
        ({"labels": {"liver": "one"}}, "'liver' must be a whole number > 0 or a list of them"),
        ({"labels": {"liver": [0, 1]}}, "'liver' must be a whole number > 0"),
        ({"labels": {"liver": []}}, "'liver' must be a whole number > 0"),
        ({"labels": {"liver+spleen": 1}}, "no '+' or ',' in their names, got 'liver+spleen'"),
        ({"labels": {"liver, left": 1}}, "no '+' or ',' in their names, got 'liver, left'"),
    ],
)
def test_a_wrong_description_is_told(folder: Path, changes: dict[str, Any], said: str) -> None:
    describe(folder, **changes)
    with pytest.raises(ValueError, match=r"dataset\.json: ") as caught:
        patients(settings_of(folder))
    assert said in str(caught.value)


def test_missing_parts_tell_the_layout(folder: Path) -> None:
    settings = settings_of(folder)
    for path in sorted((folder / "labelsTr").iterdir()):
        path.unlink()
    (folder / "labelsTr").rmdir()
    with pytest.raises(FileNotFoundError, match=r"neither labelsTr nor a file of labels; expected"):
        patients(settings)
    (folder / "imagesTr").rename(folder / "images")
    with pytest.raises(FileNotFoundError, match=r"imagesTr is not a folder; expected <root>"):
        patients(settings)
    (folder / "imagesTr").mkdir()
    with pytest.raises(ValueError, match=r"imagesTr holds no image ending in \.nii\.gz; expected"):
        patients(settings)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json is not JSON"):
        channels(settings)
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset\.json does not exist; expected <root>"):
        channels(settings)


def test_a_file_of_labels_needs_no_masks(folder: Path, tmp_path: Path) -> None:
    (folder / "labelsTr" / "case_1.nii.gz").unlink()
    (folder / "labelsTr").rmdir()
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2"}}))
    path = labels_file(tmp_path, "patient,slice,lesion\ncase_1,0,1\ncase_1,3,0\n")
    settings = settings_of(folder, "", labels=path)
    assert objects(settings) == ("lesion",)
    assert patients(settings) == ["case_1", "case_2"]
    volume = read_patient(settings, "case_1")
    assert volume.mask is None
    assert volume.slice_labels is not None
    assert volume.slice_labels.tolist() == [1, -2, -2, 0]
    unlisted = read_patient(settings, "case_2").slice_labels
    assert unlisted is not None
    assert unlisted.tolist() == [-2] * 4


def test_labels_of_a_file_go_before_those_of_masks(folder: Path, tmp_path: Path) -> None:
    path = labels_file(tmp_path, "patient,slice,tumour,liver\ncase_1,0,1,0\ncase_1,1,0,1\n")
    volume = read_patient(settings_of(folder, labels=path), "case_1")
    assert volume.mask is not None
    assert volume.mask[:, :, 0].any()
    slices, _ = prepare_volume(volume, Data(image_size=16))
    assert [item.label for item in slices] == [0, 1, -2, -2]
    assert all(item.mask is not None for item in slices)


@pytest.mark.parametrize("sign", [1, -1])
def test_slice_numbers_are_those_of_the_file(folder: Path, tmp_path: Path, sign: int) -> None:
    """A file whose second axis runs to the head, or to the feet."""
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, -1, 0], [0, 4 * sign, 0, 0], [0, 0, 0, 1]])
    image = np.zeros((6, 4, 5), np.int16)
    image[1:-1, :, 1:-1] = 10 * np.arange(1, 5)[None, :, None]
    save(folder / "imagesTr" / "case_2_0000.nii.gz", image, affine)
    path = labels_file(tmp_path, "patient,slice,liver\ncase_2,0,1\ncase_2,1,0\n")
    settings = settings_of(folder, labels=path, subject="nonzero", window=(0.0, 100.0))
    volume = read_patient(settings, "case_2")
    settings = dataclasses.replace(settings, image_size=16)
    slices, _ = prepare_volume(volume, settings)
    by_brightness = {round(float(item.image.max()), 1): item.label for item in slices}
    assert by_brightness == {-0.8: 1, -0.6: 0, -0.4: -2, -0.2: -2}  # 10 to 40 of 100


def test_faults_of_the_labels_are_told_before_anything_is_read(
    folder: Path, tmp_path: Path
) -> None:
    for text, said in (
        ("patient,slice,liver\ncase_3,0,1\n", r"labels\.csv: not in the data: 'case_3' \(line 2\)"),
        ("patient,slice,spleen\ncase_1,0,1\n", r"labels\.csv: data\.object must be one of spleen"),
    ):
        path = labels_file(tmp_path, text)
        with pytest.raises(ValueError, match=said):
            patients(settings_of(folder, labels=path))
    path = labels_file(tmp_path, "patient,slice,spleen\ncase_1,0,1\n")
    with pytest.raises(ValueError, match=r"dataset\.json: labels must name spleen as .*labels\.cs"):
        patients(settings_of(folder, "spleen", labels=path))


def test_a_fingerprint_follows_description_labels_and_mask(folder: Path, tmp_path: Path) -> None:
    path = labels_file(tmp_path, "patient,slice,liver\ncase_1,0,1\n")
    settings = settings_of(folder, labels=path)
    files = patient_files(settings, "case_1")
    assert [file.name for file in files] == [
        "dataset.json",
        "labels.csv",
        "case_1_0000.nii.gz",
        "case_1.nii.gz",
    ]
    assert len(patient_files(settings, "case_2")) == 3
    seen = {source_fingerprint(settings, "case_1")}
    for file in files:
        os.utime(file, ns=(1, 1))
        seen.add(source_fingerprint(settings, "case_1"))
    assert len(seen) == 1 + len(files)


BRATS_LABELS = {1: 1, 2: 2, 4: 3}  # consecutive, as nnU-Net asks


def beside_air(array: np.ndarray) -> np.ndarray:
    """With the empty border of a skull-stripped scan."""
    return np.pad(array, ((2, 2), (2, 2), (0, 0)))


def as_nnunet(brats: Path, names: list[str], root: Path) -> None:
    """The same patients in the layout of nnU-Net."""
    (root / "imagesTr").mkdir(parents=True)
    for name in names:
        for number, channel in enumerate(CHANNELS):
            target = root / "imagesTr" / f"{name}_{number:04d}.nii.gz"
            target.symlink_to((brats / name / f"{name}_{channel}.nii.gz").resolve())
        labels, affine = read_nifti(brats / name / f"{name}_seg.nii.gz")
        renumbered = np.zeros(labels.shape, np.uint8)
        for value, new in BRATS_LABELS.items():
            renumbered[labels == value] = new
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", renumbered, affine)
    describe(
        root,
        channel_names={str(number): name for number, name in enumerate(CHANNELS)},
        labels={"background": 0, "necrotic": 1, "oedema": 2, "enhancing": 3, "whole": [1, 2, 3]},
    )


def prepared(tmp_path: Path, name: str, *words: str) -> dict[str, bytes]:
    config = str(ROOT / "configs" / "brats.yaml")
    fixed = [f"runs={tmp_path}", f"name={name}", "tracking.enabled=false", "data.image_size=64"]
    assert main(["prepare", config, *fixed, *words]) == 0
    return {path.name: path.read_bytes() for path in (tmp_path / name / "prepare").glob("*.tar")}


def check_same_shards(brats: Path, names: list[str], tmp_path: Path, *words: str) -> None:
    splits = {"train": names[:-2], "validation": names[-2:-1], "test": names[-1:]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    as_nnunet(brats, names, tmp_path / "nnunet")
    words = (*words, f"data.splits={tmp_path / 'splits.json'}")
    expected = prepared(tmp_path, "brats", f"data.root={brats}", *words)
    assert sorted(expected) == ["test-00000.tar", "train-00000.tar", "validation-00000.tar"]
    for name in ("oedema+necrotic+enhancing", "whole"):
        given = [f"data.root={tmp_path / 'nnunet'}", "data.dataset=nnunet", f"data.object={name}"]
        assert prepared(tmp_path, f"nnunet_{name}", *given, *words) == expected


def test_brats_in_the_layout_of_nnunet_gives_the_same_shards(tmp_path: Path) -> None:
    source = Data(
        dataset="phantom", phantom=Phantom(num_patients=4, num_slices=6, grid_size=32, seed=3)
    )
    names = [f"BraTS2021_{number:05d}" for number in range(4)]
    for number, name in enumerate(names):
        volume = read_patient(source, f"phantom_{number:03d}")
        assert volume.mask is not None
        for channel, image in zip(CHANNELS, volume.image * volume.body_mask):
            path = tmp_path / "brats" / name / f"{name}_{channel}.nii.gz"
            save(path, beside_air(image.astype(np.int16)), volume.affine)
        labels = beside_air(volume.mask * np.resize([1, 2, 4], volume.mask.shape))
        path = tmp_path / "brats" / name / f"{name}_seg.nii.gz"
        save(path, labels.astype(np.uint8), volume.affine)
    check_same_shards(tmp_path / "brats", names, tmp_path, "data.min_object_pixels=4")


@pytest.mark.slow
def test_development_data_give_the_same_shards(tmp_path: Path) -> None:
    default = ROOT.parent / "shared" / "data"
    brats = Path(os.environ.get("CLDF_DATA", default)) / "brats2021"
    if not brats.is_dir():
        pytest.skip(f"no development data: set CLDF_DATA to its folder ({brats} is absent)")
    source = sorted(brats.iterdir())[:3]
    for patient in source:
        (tmp_path / "brats").mkdir(exist_ok=True)
        (tmp_path / "brats" / patient.name).symlink_to(patient.resolve())
    names = [patient.name for patient in source]
    check_same_shards(tmp_path / "brats", names, tmp_path)
