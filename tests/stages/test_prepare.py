import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cldf_dist.__main__ import main
from cldf_dist.config import Data, Phantom
from cldf_dist.data.datasets import read_patient
from cldf_dist.data.nifti import read_nifti
from cldf_dist.data.shards import ShardSet

PATIENTS = [f"phantom_{number:03d}" for number in range(12)]


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
    settings = Data(dataset="phantom", phantom=Phantom(num_patients=12, num_slices=6, grid_size=32))
    truth = read_patient(settings, table.patients[0]).mask
    assert truth is not None
    for row in range(6):
        pixels = truth.sum(axis=(0, 1))[table.indices[row]]
        label = 1 if pixels >= 4 else 0 if pixels == 0 else -1
        assert table.labels[row] == label


def test_true_masks_are_kept_for_test_patients_alone(debug_run: Any) -> None:
    folder = debug_run.folder / "prepare"
    kept = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "truth").iterdir())
    assert kept == ShardSet(folder).patients["test"]
    settings = Data(dataset="phantom", phantom=Phantom(num_patients=12, num_slices=6, grid_size=32))
    volume = read_patient(settings, kept[0])
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
