import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from chaos_files import (
    GRAYS,
    KIDNEYS,
    ORDER,
    OUT_PHASE_MS,
    SHAPE,
    SPACING,
    body,
    chaos,
    organs,
    read_t1,
    truth,
    write_ct,
    write_flat_t1,
    write_png,
    write_t1,
    write_t2,
)
from dicom_files import write_series

from cldf_dist.__main__ import main
from cldf_dist.config import CHAOS_OBJECTS, flatten, load
from cldf_dist.data.readers.chaos import (
    channels,
    listing_faults,
    new_scans,
    objects,
    patient_files,
    patients,
    read_patient,
)

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("below", ["", "Train_Sets", "Test_Sets"])
def test_root_is_the_folder_of_ct_and_mr_or_its_parent(tmp_path: Path, below: str) -> None:
    write_t1(tmp_path / below)
    data = chaos(tmp_path)
    assert patients(data) == ["MR_1"]
    assert read_patient(data, "MR_1").mask_names[0] == "MR/1/T1DUAL/Ground/IMG-0004-00002.png"


def test_patients_are_in_the_order_of_their_numbers_and_ct_is_other_people(tmp_path: Path) -> None:
    for number in ("10", "2", "1"):
        (tmp_path / "MR" / number).mkdir(parents=True)
    (tmp_path / "MR" / ".hidden").mkdir()
    write_ct(tmp_path, "2")
    assert patients(chaos(tmp_path)) == ["MR_1", "MR_2", "MR_10"]
    assert patients(chaos(tmp_path, "ct")) == ["CT_2"]


def test_t1_has_two_channels_and_the_liver_is_the_usual_object(tmp_path: Path) -> None:
    write_t1(tmp_path)
    data = chaos(tmp_path)
    assert channels(data) == ("in_phase", "out_phase")
    volume = read_patient(data, "MR_1")
    np.testing.assert_array_equal(volume.image, np.stack([body(0), body(1)]))
    np.testing.assert_array_equal(volume.mask, truth("liver"))
    assert volume.spacing == SPACING
    assert not volume.hounsfield
    assert not volume.body_mask[0, 0].any()
    assert volume.body_mask[12, 10].all()
    assert [Path(source).name for source in volume.sources] == ["InPhase", "OutPhase"]
    assert [file.name for file in volume.dicom_files] == [
        f"IMG-0004-{number:05d}.dcm" for number in (2, 4, 6, 8)
    ]
    assert len(patient_files(data, "MR_1")) == 3 * SHAPE[2]


@pytest.mark.parametrize("name", [*GRAYS, KIDNEYS, "spleen+liver"])
@pytest.mark.parametrize("modality", ["mr_t1", "mr_t2"])
def test_every_organ_of_mr_can_be_the_object(tmp_path: Path, modality: str, name: str) -> None:
    (write_t1 if modality == "mr_t1" else write_t2)(tmp_path)
    volume = read_patient(chaos(tmp_path, modality, name), "MR_1")
    assert len(volume.image) == len(channels(chaos(tmp_path, modality)))
    np.testing.assert_array_equal(volume.mask, truth(name))


def test_ct_is_in_hounsfield_units_and_has_the_liver_alone(tmp_path: Path) -> None:
    write_ct(tmp_path)
    volume = read_patient(chaos(tmp_path, "ct"), "CT_2")
    assert volume.hounsfield
    np.testing.assert_array_equal(volume.image[0], body(4) - 1024)
    np.testing.assert_array_equal(volume.mask, truth("liver"))
    assert not volume.body_mask[0, 0].any()
    assert volume.body_mask[5:19, 5:16].all()


def test_reader_and_rules_of_the_configuration_know_the_same_objects() -> None:
    known = {modality: objects(chaos(Path(), modality)) for modality in CHAOS_OBJECTS}
    assert known == CHAOS_OBJECTS


@pytest.mark.parametrize("order", [(3, 2, 1, 0), ORDER])
def test_masks_follow_their_slices_whatever_the_order_of_the_files(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    write_t1(tmp_path, order=order)
    write_ct(tmp_path, order=order)
    volume = read_t1(tmp_path)
    np.testing.assert_array_equal(volume.mask, truth("liver"))
    np.testing.assert_array_equal(volume.image[0], body(0))
    names = [f"MR/1/T1DUAL/Ground/IMG-0004-{2 * number + 2:05d}.png" for number in order]
    assert list(volume.mask_names) == names
    volume = read_patient(chaos(tmp_path, "ct"), "CT_2")
    np.testing.assert_array_equal(volume.mask, truth("liver"))
    assert list(volume.mask_names) == [f"CT/2/Ground/liver_GT_{n:03d}.png" for n in order]


def test_numbers_in_the_names_of_ct_files_count_as_numbers(tmp_path: Path) -> None:
    shape = (*SHAPE[:2], 12)
    liver = np.where(organs(shape) == 63, 255, 0).astype(np.uint8)
    write_ct(tmp_path, liver=liver, name="IMG-2-{}.dcm", order=range(12)[::-1])
    volume = read_patient(chaos(tmp_path, "ct"), "CT_2")
    np.testing.assert_array_equal(volume.mask, liver > 0)


def test_mr_masks_of_other_names_belong_to_the_in_phase_files_in_order(tmp_path: Path) -> None:
    ground = write_t1(tmp_path, order=ORDER) / "Ground"
    for number, mask in enumerate(sorted(ground.iterdir())):
        mask.rename(ground / f"mask{number}.png")
    volume = read_t1(tmp_path)
    np.testing.assert_array_equal(volume.mask, truth("liver"))
    assert volume.mask_names[0] == f"MR/1/T1DUAL/Ground/mask{ORDER[0]}.png"


def test_files_that_systems_leave_behind_are_no_masks(tmp_path: Path) -> None:
    ground = write_t1(tmp_path) / "Ground"
    for name in ("._IMG-0004-00002.png", "Thumbs.db"):
        (ground / name).write_bytes(b"?")
    np.testing.assert_array_equal(read_t1(tmp_path).mask, truth("liver"))


def test_without_masks_their_files_are_named_as_chaos_would(tmp_path: Path) -> None:
    write_t1(tmp_path, ground=False, order=ORDER)
    write_ct(tmp_path, ground=False, order=ORDER, name="i{:04d},0000b.dcm")
    volume = read_t1(tmp_path)
    assert volume.mask is None
    assert volume.mask_names[0] == f"MR/1/T1DUAL/Ground/IMG-0004-{2 * ORDER[0] + 2:05d}.png"
    volume = read_patient(chaos(tmp_path, "ct"), "CT_2")
    assert volume.mask is None
    assert volume.mask_names[0] == f"CT/2/Ground/liver_GT_{ORDER[0]:03d}.png"


def remove_images(folder: Path) -> None:
    shutil.rmtree(folder / "DICOM_anon")


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_one_echo(folder: Path) -> None:
    shutil.rmtree(folder / "DICOM_anon" / "OutPhase")


def remove_one_slice_of_an_echo(folder: Path) -> None:
    (folder / "DICOM_anon" / "OutPhase" / "IMG-0004-00007.dcm").unlink()


def remove_one_mask(folder: Path) -> None:
    (folder / "Ground" / "IMG-0004-00002.png").unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (remove_images, r"T1DUAL holds 4 masks but no images; .*InPhase and DICOM_anon/OutPhase"),
        (remove_all, "T1DUAL is empty; expected DICOM files in DICOM_anon/InPhase"),
        (remove_one_echo, "OutPhase has no DICOM files, mr_t1 needs both echoes; fetch it"),
        (remove_one_slice_of_an_echo, "T1DUAL: both echoes .* 4 in .*InPhase and 3 in .*OutPhase"),
        (remove_one_mask, "Ground must hold a mask per slice, got 3 masks .* 4 in .*InPhase"),
    ],
)
def test_incomplete_folders_are_found_before_a_file_is_opened(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = write_t1(tmp_path)
    assert listing_faults(chaos(tmp_path), "MR_1") == []
    harm(folder)
    (fault,) = listing_faults(chaos(tmp_path), "MR_1")
    with pytest.raises(ValueError, match=said) as raised:
        read_t1(tmp_path)
    assert str(raised.value) == fault
    assert "\n" not in fault


def test_masks_of_which_only_some_are_named_like_slices_are_refused(tmp_path: Path) -> None:
    ground = write_t1(tmp_path) / "Ground"
    (ground / "IMG-0004-00002.png").rename(ground / "IMG-0009-00002.png")
    with pytest.raises(ValueError, match=r"IMG-0009-00002.png must be named like a DICOM file"):
        read_t1(tmp_path)


def test_a_mask_of_another_size_than_its_slice_is_named(tmp_path: Path) -> None:
    ground = write_t1(tmp_path) / "Ground"
    write_png(ground / "IMG-0004-00004.png", organs()[:-1, :, 1])
    with pytest.raises(ValueError, match=r"00004.png: .* 24 columns and 20 rows, got 23 and 20"):
        read_t1(tmp_path)


def test_echoes_on_different_grids_are_named(tmp_path: Path) -> None:
    folder = write_t1(tmp_path) / "DICOM_anon" / "OutPhase"
    shutil.rmtree(folder)
    write_series(folder, body(1), modality="MR", spacing=(2.0, 1.5, 4.0), EchoTime=OUT_PHASE_MS)
    with pytest.raises(ValueError, match=r"InPhase and .*OutPhase must have the same affine"):
        read_t1(tmp_path)


def test_a_scan_of_another_scanner_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path, modality="MR")
    with pytest.raises(ValueError, match="needs DICOM files of Modality CT, got MR"):
        read_patient(chaos(tmp_path, "ct"), "CT_2")


def test_an_organ_that_ct_does_not_show_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path)
    with pytest.raises(ValueError, match=r"data.object must be one of liver, .*'spleen'"):
        read_patient(chaos(tmp_path, "ct", "spleen"), "CT_2")


@pytest.mark.parametrize("patient", ["1", "CT_1", "MR_2", "MR_", "MR_1/T1DUAL"])
def test_an_unknown_patient_is_named(tmp_path: Path, patient: str) -> None:
    write_t1(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no patient '{patient}' in .*names are MR_<id>"):
        read_patient(chaos(tmp_path), patient)


def test_a_root_without_the_scanner_is_named_with_the_layout(tmp_path: Path) -> None:
    write_t1(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no folder CT, .*CT/<id>/DICOM_anon/\*.dcm"):
        patients(chaos(tmp_path, "ct"))
    with pytest.raises(FileNotFoundError, match=r"MR/<id>/T1DUAL/DICOM_anon/{InPhase,OutPhase}/"):
        patients(chaos(tmp_path / "nowhere"))
    (tmp_path / "CT").mkdir()
    with pytest.raises(ValueError, match="CT is empty; expected a folder per patient: CT/<id>/"):
        patients(chaos(tmp_path, "ct"))
    with pytest.raises(ValueError, match=r"data.modality must be one of .*, got 'pet'"):
        patients(chaos(tmp_path, "pet"))


def test_nothing_about_the_patient_leaves_the_dicom_files(tmp_path: Path) -> None:
    person = {
        "PatientName": "Zebedaeus^Quokka",
        "PatientID": "QX-778899",
        "PatientBirthDate": "19310704",
        "StudyDate": "19980317",
        "StudyTime": "031425",
        "InstitutionName": "Pinewood Infirmary",
    }
    for patient in ("1", "2", "3"):
        write_t1(tmp_path / "scans", patient, **person)
    some = next((tmp_path / "scans").rglob("*.dcm")).read_bytes()
    secrets = [value.encode() for value in person.values()]
    assert all(secret in some for secret in secrets)
    words = [
        *("data.dataset=chaos", f"data.root={tmp_path / 'scans'}", f"runs={tmp_path / 'runs'}"),
        *("data.modality=mr_t1", "tracking.enabled=false"),
    ]
    assert main(["prepare", str(CONFIGS / "debug.yaml"), *words]) == 0
    written = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"manifest.json", "DONE"} < {file.name for file in written}
    for file in written:
        packed = file.name.endswith(".gz")
        content = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
        found = [secret for secret in secrets if secret in content]
        assert not found, file
    volume = repr(read_patient(chaos(tmp_path / "scans"), "MR_1")).encode()
    assert not [secret for secret in secrets if secret in volume]


@pytest.mark.parametrize("name", ["liver", "kidney", "spleen"])
def test_configurations_load_and_never_flip_the_sides(name: str) -> None:
    files = [str(CONFIGS / f"chaos_{name}.yaml"), str(CONFIGS / "small.yaml")]
    for paths in (files[:1], files):
        config = load(paths)
        flips = {path: value for path, value in flatten(config).items() if path.endswith(".flip")}
        assert len(flips) == 5
        assert not any(flips.values()), flips
        assert config.data.object in (name, KIDNEYS)
    if name == "liver":
        assert load(files, ["data.modality=ct"]).data.modality == "ct"
    else:
        with pytest.raises(ValueError, match=r"data.object must be of liver .*ct"):
            load(files, ["data.modality=ct"])


def development_data() -> Path:
    default = Path(__file__).parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("CLDF_DATA", default)) / "chaos"
    if not folder.is_dir():
        pytest.skip(f"no development data: set CLDF_DATA to its folder ({folder} is absent)")
    return folder


def test_development_ct_shows_a_liver_under_its_masks() -> None:
    data = chaos(development_data(), "ct")
    assert patients(data) == ["CT_2", "CT_4", "CT_6"]
    volume = read_patient(data, "CT_4")
    assert volume.mask is not None
    liver = volume.image[0][volume.mask]
    assert 50 < np.median(liver) < 200  # enhanced; Hounsfield units
    assert np.subtract(*np.percentile(liver, (75, 25))) < 60
    assert not (volume.mask & ~volume.body_mask).any()


@pytest.mark.parametrize("modality", ["mr_t1", "mr_t2"])
def test_development_mr_shows_the_kidneys_on_their_sides(modality: str) -> None:
    root = development_data()
    centres = {}
    for name in ("right_kidney", "left_kidney"):
        volume = read_patient(chaos(root, modality, name), "MR_11")
        assert volume.mask is not None
        voxels = np.argwhere(volume.mask)
        centres[name] = volume.affine[0, :3] @ voxels.mean(axis=0) + volume.affine[0, 3]
        assert not (volume.mask & ~volume.body_mask).any()
    assert centres["right_kidney"] > centres["left_kidney"]  # RAS: x grows to the right


@pytest.mark.parametrize(
    ("below", "name"),
    [
        *(("", "MR_1"), ("MR/1", "MR_1"), ("MR/1/T1DUAL", "MR_1")),
        *(("MR/1/T1DUAL/DICOM_anon", "MR_1"), ("anywhere", "anywhere"), ("plain", "plain")),
    ],
)
def test_new_scans_are_found_at_every_level_and_in_folders_of_two_echoes(
    tmp_path: Path, below: str, name: str
) -> None:
    folder = write_t1(tmp_path)
    shutil.copytree(folder / "DICOM_anon", tmp_path / "anywhere")
    shutil.move(write_flat_t1(tmp_path / "other") / "DICOM_anon", tmp_path / "plain")
    (folder / "Ground" / "IMG-0004-00002.png").write_bytes(b"masks are not opened")
    ((found, read),) = new_scans(chaos(tmp_path / "unused"), tmp_path / below)
    volume = read()
    assert volume.patient == found == name
    assert volume.mask is None
    np.testing.assert_array_equal(volume.image, np.stack([body(0), body(1)]))
    person = name.removeprefix("MR_")
    assert volume.mask_names[0] == f"MR/{person}/T1DUAL/Ground/IMG-0004-00002.png"


def test_new_scans_of_ct_are_found_and_other_folders_hold_none(tmp_path: Path) -> None:
    write_ct(tmp_path, "2")
    write_ct(tmp_path, "10")
    data = chaos(tmp_path / "unused", "ct")
    assert [name for name, _ in new_scans(data, tmp_path)] == ["CT_2", "CT_10"]
    ((name, read),) = new_scans(data, tmp_path / "CT" / "10")
    assert read().patient == name == "CT_10"
    for folder, modality in (("", "mr_t1"), ("CT", "ct"), ("CT", "mr_t1"), ("nowhere", "mr_t1")):
        assert new_scans(chaos(tmp_path, modality), tmp_path / folder) == []
