"""Which entries of a folder count, and in which order."""

from pathlib import Path

from cldf_dist.data.formats.dicom import dicom_folders
from cldf_dist.data.formats.listing import first_faults, natural_order, nifti_files, subfolders


def test_what_systems_and_archivers_leave_behind_does_not_count(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", "__MACOSX"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "1.dcm").write_bytes(b"")
        for file in ("2.nii", "1.nii.gz", ".3.nii.gz", "__MACOSX.nii", "4.txt"):
            (folder / file).write_bytes(b"")
    assert subfolders(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert [file.name for file in nifti_files(tmp_path / "a")] == ["1.nii.gz", "2.nii"]
    found = list(dicom_folders(tmp_path))
    assert found == [[tmp_path / "a" / "1.dcm"], [tmp_path / "b" / "1.dcm"]]


def test_numbers_in_names_count_as_numbers() -> None:
    names = ["IM10", "IM9", "a2", "1"]
    assert sorted(map(Path, names), key=natural_order) == [
        Path(n) for n in ("1", "IM9", "IM10", "a2")
    ]


def test_the_first_faults_are_shown_and_the_others_counted() -> None:
    assert first_faults(["a", "b"]) == "a; b"
    assert first_faults(list("abcdefg")) == "a; b; c; d; e; and 2 more"
