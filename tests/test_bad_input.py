"""Bad data get one clear line, leave nothing half made, and can be repaired.

Through the command line throughout: what fails names the file or the setting, the rule and the
remedy; and when the input is put right, the same command does the work.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_files import (
    AFFINE,
    BUILDERS,
    MODALITIES,
    PATIENTS,
    SECOND,
    add_line,
    brats_file,
    change,
    compress,
    describe,
    flip,
    lay_again,
    mix_series,
    move_slice,
    save_nifti,
    save_scaled,
    truncate,
    voxels_of,
    with_voxel,
    words_of,
)
from command_line import CommandLine
from PIL import Image

from cldf_dist.data.shards.table import ShardSet

SMALL = ["name=x", "data.image_size=32", "data.min_object_pixels=4", "tracking.enabled=false"]
T1, SEG = f"{SECOND}_t1.nii.gz", f"{SECOND}_seg.nii.gz"
LABELS = "labels must be one of [0, 1, 2, 4]"
DAMAGED = ("is truncated or damaged", "fetch it again")
SPLITS = {"train": list(PATIENTS[:2]), "validation": [PATIENTS[2]], "test": [PATIENTS[3]]}


@pytest.fixture
def cldf(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    return CommandLine(tmp_path / "runs", capsys, monkeypatch)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good data set of each kind, to be copied."""
    folders = {kind: tmp_path_factory.mktemp("good") / "data" for kind in BUILDERS}
    for kind, folder in folders.items():
        folder.mkdir()
        BUILDERS[kind](folder)
    return folders


@pytest.fixture
def brats(good: dict[str, Path], tmp_path: Path) -> list[str]:
    """The words that prepare a good BraTS folder."""
    lay_again(good["brats"], tmp_path / "scans")
    return ["prepare", *SMALL, *words_of("brats", tmp_path / "scans")]


@dataclass(frozen=True)
class Spoiled:
    """A data set of a kind, what goes wrong with its folder, and what must be said."""

    name: str
    kind: str
    spoil: Callable[[Path], object]
    said: tuple[str, ...]  # which file or setting, the rule, the remedy


def in_t1(function: Callable[..., object], *arguments: Any) -> Callable[[Path], object]:
    return lambda root: function(brats_file(root, "t1"), *arguments)


def in_seg(value: float, kind: str = "float32") -> Callable[[Path], object]:
    return lambda root: change(brats_file(root, "seg"), with_voxel(value, kind))


def everywhere(modalities: tuple[str, ...], value: int) -> Callable[[Path], object]:
    """All voxels of these files have the value, in all patients."""

    def spoil(root: Path) -> None:
        for file in [brats_file(root, kind, name) for kind in modalities for name in PATIENTS]:
            change(file, lambda voxels: np.full_like(voxels, value))

    return spoil


def remove(*names: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return spoil


def unpack(path: Path) -> None:
    subprocess.run(["gzip", "-d", path], check=True)
    path.with_suffix("").rename(path)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.nii.gz")


def ground(root: Path) -> list[Path]:
    return sorted((root / "MR" / "2" / "T1DUAL" / "Ground").iterdir())


def brats_case(name: str, spoil: Callable[[Path], object], *said: str) -> Spoiled:
    return Spoiled(name, "brats", spoil, said)


NIFTI = [
    brats_case("no folder", shutil.rmtree, "scans", "data.root is not a folder", "set it to"),
    brats_case("no patients", remove(*PATIENTS), "scans", "it is empty", "expected <root>/"),
    brats_case(
        "no modality", in_t1(Path.unlink), SECOND, "has no t1 scan", "add it or leave the patient"
    ),
    brats_case("a broken link", in_t1(link_to_nothing), T1, "is not a file", "put the scan there"),
    brats_case(
        "another shape",
        in_t1(change, lambda voxels: voxels[:, :, 1:]),
        T1, "must have the same shape", "resample them to one grid",
    ),
    brats_case(
        "another affine",
        in_t1(lambda path: save_nifti(path, np.ones((16, 16, 6), np.int16), 2 * AFFINE)),
        T1, "must have the same affine", "register them to one grid",
    ),
    brats_case("cut in the middle", in_t1(truncate, 1000), T1, *DAMAGED),
    brats_case("cut in its checksum", in_t1(truncate, -6), T1, *DAMAGED),
    brats_case("cut by one byte", in_t1(truncate, -1), T1, *DAMAGED),
    brats_case("cut to nothing", in_t1(truncate, 0), T1, *DAMAGED),
    brats_case("a flipped bit", in_t1(flip), T1, *DAMAGED),
    brats_case("an error page", in_t1(lambda path: path.write_text("<html>")), T1, *DAMAGED),
    brats_case("not packed", in_t1(unpack), T1, "is not packed", "take .gz off its name"),
    brats_case(
        "packed in secret",
        in_t1(lambda path: path.rename(path.with_suffix(""))),
        T1.removesuffix(".gz"), "is packed by gzip", "add .gz to its name",
    ),
    brats_case(
        "nan", in_t1(change, with_voxel(np.nan)), T1, "not finite numbers", "repair the file"
    ),
    brats_case(
        "no contrast",
        in_t1(change, lambda voxels: np.where(voxels > 0, 7, 0).astype(np.int16)),
        T1, "must have contrast",
    ),
    brats_case("an empty scan", everywhere(MODALITIES, 0), PATIENTS[0], "the scan is empty"),
    brats_case("label 3 of 2021", in_seg(3), SEG, LABELS, "found [3.0] in 1 voxels", "repair"),
    brats_case("label 5", in_seg(5, "uint8"), SEG, LABELS, "found [5]", "leave the patient out"),
    brats_case("label 0.5", in_seg(0.5), SEG, LABELS, "found [0.5]", "leave the patient out"),
    brats_case(
        "beyond 32 bits",
        in_t1(change, with_voxel(2**40, "int64")),
        T1, "int64 values must fit 32 bits", "rescale the file",
    ),
    brats_case(
        "a fourth axis",
        in_t1(change, lambda voxels: np.stack([voxels, voxels], axis=3)),
        T1, "must be three-dimensional, got shape (16, 16, 6, 2)", "save one volume a file",
    ),
    brats_case(
        "positive slices alone", everywhere(("seg",), 2),
        "the train split", "12 slices with and 0 without", "check the masks, data.min_object",
    ),
    brats_case(
        "negative slices alone", everywhere(("seg",), 0),
        "the train split", "0 slices with and 12 without", "check the masks, data.min_object",
    ),
    brats_case(
        "no masks", remove(*(f"{name}/{name}_seg.nii.gz" for name in PATIENTS)),
        "the train split", "12 that neither a mask nor a list tells of", "check the masks",
    ),
    brats_case(
        "two patients", remove(*PATIENTS[2:]),
        "2 patients are too few for 1 validation and 1 test", "add patients or lower data.",
    ),
    brats_case(
        "a patient with a space", lambda root: (root / SECOND).rename(root / "Fall größe 1"),
        "'Fall größe 1'", "must consist of A-Z", "rename the folder",
    ),
]  # fmt: skip
DICOM = [
    Spoiled("a missing slice", "dicom", remove(f"{SECOND}/002.dcm"), (
        SECOND, "001.dcm and 003.dcm are 4.000 mm apart", "fetch the whole series")),
    Spoiled("a slice twice", "dicom", lambda root: move_slice(root, 2.0), (
        f"{SECOND}/00", "are slices of one place", "remove the one that is not wanted")),
    Spoiled("a slice out of step", "dicom", lambda root: move_slice(root, 0.7), (
        SECOND, "must be equally spaced", "resample the scan")),
    Spoiled("two series", "dicom", mix_series, (
        SECOND, "holds 2 series, must be one", "keep one folder per series")),
    Spoiled("no decoder", "dicom", compress, (
        f"{SECOND}/002.dcm", "no decoder is installed", "decompress it with")),
    Spoiled("a cut slice", "dicom", lambda root: truncate(root / SECOND / "002.dcm", -100), (
        f"{SECOND}/002.dcm", "cannot be decoded", "fetch it again")),
    Spoiled("no labels", "dicom", remove("labels.csv"), (
        "data.labels: ", "labels.csv does not exist")),
    Spoiled("a mask of another size", "chaos",
        lambda root: Image.new("L", (7, 9)).save(ground(root)[1]), (
        "MR/2/T1DUAL/Ground/", "must have the size of its slice", "fetch the original mask")),
    Spoiled("too few masks", "chaos", lambda root: ground(root)[1].unlink(), (
        "MR/2/T1DUAL/Ground", "must hold a mask per slice, got 3 masks", "fetch all")),
    Spoiled("masks without images", "chaos", remove("MR/2/T1DUAL/DICOM_anon"), (
        "MR/2/T1DUAL", "holds 4 masks but no images", "expected DICOM files in")),
    Spoiled("interpolated masks", "chaos",
        lambda root: Image.new("L", (24, 20), 90).save(ground(root)[1]), (
        "MR/2/T1DUAL/Ground/", "gray values must be 0 or 56-70 liver", "fetch the original")),
]  # fmt: skip
NNUNET = [
    Spoiled("no description", "nnunet", remove("dataset.json"), (
        "dataset.json does not exist", "expected <root>/dataset.json")),
    Spoiled("not JSON", "nnunet", lambda root: truncate(root / "dataset.json", 30), (
        "dataset.json is not JSON",)),
    Spoiled("no label names", "nnunet", partial(describe, labels=None), (
        "dataset.json: labels must name at least one object", "such as {\"tumour\": 1}")),
    Spoiled("a mask without image", "nnunet",
        lambda root: shutil.copy(root / f"labelsTr/{SECOND}.nii.gz", root / "labelsTr/b.nii.gz"), (
        "labelsTr/b.nii.gz", "belongs to no case", "add the images or remove it")),
    Spoiled("an unknown patient", "listed nnunet",
        lambda root: add_line(root / "labels.csv", "case_9,0,1"), (
        "labels.csv", "case_9", "must be called as in the data")),
    Spoiled("a row twice", "listed nnunet",
        lambda root: add_line(root / "labels.csv", f"{SECOND},3,1"), (
        "labels.csv, line 26", f"slice '3' of patient {SECOND} is already in line", "keep one")),
    Spoiled("a wrong value", "listed nnunet",
        lambda root: add_line(root / "labels.csv", f"{SECOND},9,yes"), (
        "labels.csv, line 26", "tumour must be 0, 1 or empty", "got 'yes'")),
    Spoiled("a slice that is not there", "listed nnunet",
        lambda root: add_line(root / "labels.csv", f"{SECOND},6,1"), (
        "labels.csv", "has no slice '6'", "its 6 slices go by '0' to '5'")),
]  # fmt: skip


@pytest.mark.parametrize("case", [*NIFTI, *DICOM, *NNUNET], ids=lambda case: case.name)
def test_bad_data_is_named_and_the_same_command_succeeds_once_it_is_repaired(
    case: Spoiled, good: dict[str, Path], tmp_path: Path, cldf: CommandLine
) -> None:
    root = tmp_path / "scans"
    words = ["prepare", *SMALL, *words_of(case.kind, root)]
    lay_again(good[case.kind], root)
    case.spoil(root)
    error = cldf.fails(*words)
    for part in case.said:
        assert part in error
    lay_again(good[case.kind], root)
    cldf.succeeds(*words)
    ShardSet(cldf.runs / "x" / "prepare").verify()


def test_unusual_but_sound_files_give_the_same_shards(
    brats: list[str], tmp_path: Path, cldf: CommandLine
) -> None:
    """Labels that come back as 4.00000024, and 64-bit integers that fit 32 bits."""
    cldf.succeeds(*brats)
    root = tmp_path / "scans"
    save_scaled(brats_file(root, "seg"))
    assert (voxels_of(brats_file(root, "seg")) > 4).any()
    change(brats_file(root, "t1"), lambda voxels: voxels.astype(np.int64))
    cldf.succeeds(*brats, "name=y")
    one, other = (ShardSet(cldf.runs / name / "prepare").manifest["shards"] for name in "xy")
    assert one == other


@pytest.mark.parametrize(
    ("kind", "place", "said"),
    [
        ("brats", "..", ("the patients are one folder deeper, set data.root=", "/data")),
        (
            "brats",
            SECOND,
            (f"{SECOND} holds no BraTS scans", "it is one patient's folder, set data.root="),
        ),
        ("brats", f"{SECOND}/{T1}", ("data.root is not a folder", "set it to the folder <root>")),
        ("chaos", "MR", ("MR has no folder MR", "expected MR/<id>/T1DUAL")),
        ("nnunet", "imagesTr", ("imagesTr/dataset.json does not exist", "expected <root>/")),
        ("dicom", SECOND, ("holds no folders with DICOM files", "expected <root>/<patient>")),
    ],
)
def test_a_root_of_the_wrong_level_is_told_what_it_should_hold(
    kind: str, place: str, said: tuple[str, ...], good: dict[str, Path], cldf: CommandLine
) -> None:
    root = good[kind]
    words = ["prepare", *SMALL, *words_of(kind, root)]
    error = cldf.fails(*words, f"data.root={root / place}")
    for part in said:
        assert part in error


@pytest.mark.parametrize("name", ["Größe ü", "a b", "x=y", "[1],{2}"])
def test_folders_may_have_any_name(
    name: str, good: dict[str, Path], tmp_path: Path, cldf: CommandLine
) -> None:
    lay_again(good["brats"], tmp_path / name / "scans")
    words = words_of("brats", tmp_path / name / "scans")
    code, said = cldf("prepare", *SMALL, *words)
    assert code == 0, said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            json.dumps({**SPLITS, "test": ["case_9"]}),
            ("not in the data: case_9", "change the list"),
        ),
        (json.dumps({**SPLITS, "test": []}), ("'test'", "has no patients")),
        (
            json.dumps({"train": [], "val": []}),
            ("must have exactly the keys", "got 'train', 'val'"),
        ),
        ("[]", ("must have exactly the keys train, validation, test", "expected {")),
        ("{train:", ("is not JSON", 'expected {"train": [patient')),
        (json.dumps(SPLITS).encode("utf-16"), ("is not UTF-8 text", "save it as such")),
        (None, ("does not exist", 'expected {"train": [patient')),
    ],
    ids=["unknown patient", "empty", "other keys", "list", "not JSON", "UTF-16", "missing"],
)
def test_a_splits_file_that_does_not_fit_the_data_is_named(
    content: str | bytes | None,
    said: tuple[str, ...],
    brats: list[str],
    tmp_path: Path,
    cldf: CommandLine,
) -> None:
    path = tmp_path / "splits.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    words = [*brats, f"data.splits={path}"]
    error = cldf.fails(*words)
    for part in (path.name, *said):
        assert part in error
    as_windows_saves_it = json.dumps(SPLITS, indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + as_windows_saves_it.encode())
    cldf.succeeds(*words)
    assert ShardSet(cldf.runs / "x" / "prepare").patients == SPLITS
