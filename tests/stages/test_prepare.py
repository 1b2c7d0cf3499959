import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cldf_dist.__main__ import main
from cldf_dist.config import Data, Phantom, load
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.datasets import channels, read_patient
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.stages.prepare import check_unchanged

PATIENTS = [f"phantom_{number:03d}" for number in range(12)]


SETTINGS = Data(dataset="phantom", phantom=Phantom(num_patients=12, num_slices=6, grid_size=32))


@dataclass(frozen=True)
class Scans:
    """Phantom patients as a BraTS folder without masks, and a splits file of them."""

    root: Path

    @property
    def names(self) -> list[str]:
        return PATIENTS[:5]

    @property
    def splits(self) -> dict[str, list[str]]:
        names = self.names
        return {"train": names[:2], "validation": names[2:3], "test": names[3:]}

    @property
    def splits_file(self) -> Path:
        return self.root.parent / "splits.json"

    @property
    def words(self) -> list[str]:
        return ["data.dataset=brats", f"data.root={self.root}", f"data.splits={self.splits_file}"]

    def add_masks(self, names: list[str]) -> None:
        for name in names:
            volume = read_patient(SETTINGS, name)
            assert volume.mask is not None
            path = self.root / name / f"{name}_seg.nii.gz"
            write_nifti(path, volume.mask.astype(np.uint8), volume.affine)


@pytest.fixture
def scans(tmp_path: Path) -> Scans:
    found = Scans(tmp_path / "scans")
    for name in found.names:
        volume = read_patient(SETTINGS, name)
        for kind, channel in zip(channels(SETTINGS), volume.image * volume.body_mask):
            path = found.root / name / f"{name}_{kind}.nii.gz"
            write_nifti(path, channel, volume.affine)
    found.splits_file.write_text(json.dumps(found.splits))
    return found


def shards(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    assert found
    return {**found, "manifest.json": (folder / "manifest.json").read_bytes()}


def test_every_patient_is_in_one_split_and_every_shard_is_whole(debug_run: Any) -> None:
    prepared = ShardSet(debug_run.folder / "prepare")
    assert sorted(chain(*prepared.patients.values())) == PATIENTS
    prepared.verify()
    for split, patients in prepared.patients.items():
        table = prepared.split(split)
        assert set(table.patients) == set(patients)
        assert {0, 1} <= set(table.labels.tolist())


def test_labels_are_those_of_the_masks(debug_run: Any) -> None:
    table = ShardSet(debug_run.folder / "prepare").split("train")
    truth = read_patient(SETTINGS, table.patients[0]).mask
    assert truth is not None
    for row in range(6):
        pixels = truth.sum(axis=(0, 1))[table.indices[row]]
        label = 1 if pixels >= 4 else 0 if pixels == 0 else -1
        assert table.labels[row] == label


def test_true_masks_are_kept_for_test_patients_alone(debug_run: Any) -> None:
    folder = debug_run.folder / "prepare"
    kept = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "truth").iterdir())
    assert kept == ShardSet(folder).patients["test"]
    volume = read_patient(SETTINGS, kept[0])
    stored, affine = read_nifti(folder / "truth" / f"{kept[0]}.nii.gz")
    np.testing.assert_array_equal(stored > 0, volume.mask)
    np.testing.assert_allclose(affine, volume.affine, atol=1e-5)


def test_an_interrupted_preparation_goes_on_and_gives_the_same_shards(
    debug_run: Any, tmp_path: Path, interrupt_when: Callable[..., None]
) -> None:
    run = debug_run.copy_to(tmp_path)
    spool = run.folder / "prepare" / ".spool"
    interrupt_when(lambda: len(list(spool.glob("phantom_*.npz"))) >= 3)
    assert main(["prepare", *run.words]) == 130
    spooled = {path: path.stat().st_mtime_ns for path in spool.glob("phantom_*.npz")}
    assert 3 <= len(spooled) <= 12
    assert main(["prepare", *run.words]) == 0
    assert shards(run.folder / "prepare") == shards(debug_run.folder / "prepare")
    assert not spool.exists()


def test_a_splits_file_is_followed(debug_run: Any, tmp_path: Path) -> None:
    splits = {"train": PATIENTS[4:], "validation": PATIENTS[:2], "test": PATIENTS[2:4]}
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    run = debug_run.copy_to(tmp_path)
    assert main(["prepare", *run.words, f"data.splits={path}"]) == 0
    assert ShardSet(run.folder / "prepare").patients == splits


def test_a_split_without_positive_slices_is_an_error(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path)
    assert main(["prepare", *run.words, "data.min_object_pixels=1000"]) == 1
    said = capsys.readouterr().err
    assert "the train split has 0 slices with and" in said
    assert "check the masks, data.min_object_pixels and data.splits" in said
    assert not (run.folder / "prepare" / "DONE").exists()


def test_patients_whose_files_changed_are_read_again_and_the_others_are_not(
    debug_run: Any, scans: Scans, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path)
    words = ["prepare", *run.words, *scans.words]
    spool = run.folder / "prepare" / ".spool"

    def spooled() -> dict[str, int]:
        return {path.stem: path.stat().st_mtime_ns for path in spool.glob("phantom_*.npz")}

    assert main(words) == 1
    assert "the train split has 0 slices with and 0 without the object" in capsys.readouterr().err
    before = spooled()
    assert sorted(before) == scans.names
    damaged, masked = scans.splits["train"][:2]
    (spool / f"{damaged}.npz").write_bytes(b"damaged")
    scans.add_masks([masked])
    assert main(words) == 1
    assert "the validation split has 0 slices with" in capsys.readouterr().err
    assert {name for name in before if before[name] != spooled()[name]} == {damaged, masked}
    scans.add_masks(scans.names)
    assert main(words) == 0
    assert "has a mask" not in capsys.readouterr().err
    prepared = ShardSet(run.folder / "prepare")
    assert all((prepared.split(split).labels > -2).all() for split in prepared.patients)
    assert len(list((run.folder / "prepare" / "truth").iterdir())) == len(scans.splits["test"])


def test_test_patients_without_a_mask_are_told(
    debug_run: Any, scans: Scans, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path)
    scans.add_masks([*scans.splits["train"], *scans.splits["validation"]])
    assert main(["prepare", *run.words, *scans.words]) == 0
    assert (
        "prepare: none of the 2 test patients has a mask; evaluate will have nothing to score"
        in capsys.readouterr().err
    )


def test_a_patient_of_whom_no_slice_is_kept_is_refused(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path)
    words = ["prepare", *run.words, "data.min_body_fraction=1.0"]
    for _ in range(2):  # the second start does not take it for done
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "phantom_000: no slice is kept" in said
        assert "less than data.min_body_fraction=1.0 of every slice; lower that" in said


def test_what_listings_give_away_is_told_before_the_first_patient_is_read(
    debug_run: Any, scans: Scans, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path)
    words = ["prepare", *run.words, *scans.words]
    last = scans.root / scans.names[-1]
    (last / f"{last.name}_t1.nii.gz").rename(last / "away.nii.gz")
    assert main(words) == 1
    assert f"{last.name} has no t1 scan" in capsys.readouterr().err
    (last / "away.nii.gz").rename(last / f"{last.name}_t1.nii.gz")

    splits = {**scans.splits, "test": scans.splits["test"][:1]}
    scans.splits_file.write_text(json.dumps(splits))
    for asked in (words, [*words, "--dry-run"]):
        assert main(asked) == 1
        assert f"missing from the file: {scans.splits['test'][1]}" in capsys.readouterr().err

    for name in scans.names[2:]:
        shutil.rmtree(scans.root / name)
    assert main([*words, "data.splits="]) == 1
    assert "2 patients are too few for 1 validation and 1 test patients" in capsys.readouterr().err
    assert not (run.folder / "prepare" / ".spool").exists()


def test_a_finished_folder_keeps_to_its_splits_file(debug_run: Any, tmp_path: Path) -> None:
    folder = debug_run.folder / "prepare"
    path = tmp_path / "splits.json"
    config = load(debug_run.words[:1], [*debug_run.words[1:], f"data.splits={path}"])
    held = ShardSet(folder).patients
    path.write_text(json.dumps({split: names[::-1] for split, names in held.items()}))
    check_unchanged(config, folder)
    check_unchanged(load(debug_run.words[:1], debug_run.words[1:]), folder)

    test, train = held["test"], held["train"]
    changed = {**held, "test": [*test[1:], train[0]], "train": [*train[1:], test[0]]}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=rf"splits\.json no longer says .*{test[0]}.*name=\.\.\."):
        check_unchanged(config, folder)
    path.write_text(json.dumps({**held, "test": test[1:]}))
    with pytest.raises(ValueError, match=rf"missing from the file: {test[0]}; .*or delete .*debug"):
        check_unchanged(config, folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"splits\.json does not exist.*; .*manifest\.json holds"):
        check_unchanged(config, folder)


def test_a_finished_folder_of_a_splits_file_is_not_taken_for_a_random_split(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    path = run.folder / "prepare" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["splits"] = "/data/splits.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"split by data\.splits=/data/splits\.json, now not set"):
        check_unchanged(load(run.words[:1], run.words[1:]), path.parent)
