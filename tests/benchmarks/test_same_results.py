"""What benchmarks/same_results.py calls the same, on the debug run."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "same_results.py"


@pytest.fixture(scope="module")
def same_results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_results", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found_in(module: ModuleType, folder: Path) -> dict[tuple[str, str], str]:
    return {("1", item): digest for item, digest in module.digests(folder).items()}


def test_every_item_of_the_baseline_is_found_and_a_changed_voxel_is_the_only_difference(
    same_results: ModuleType, debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one process: the names only, since last bits depend on the CPU."""
    found = found_in(same_results, debug_run.folder)
    lines = same_results.BASELINE.read_text().splitlines()[1:]
    published = {tuple(line.split(",")[-3:-1]) for line in lines}
    assert {item for item in published if item[0] == "1"} == set(found)
    baseline = tmp_path / "baseline.csv"
    same_results.write_baseline(baseline, found)
    assert same_results.report(baseline, found) == 0
    copy = tmp_path / "debug"
    shutil.copytree(debug_run.folder, copy)
    mask = next((copy / "segment" / "masks" / "cldf").iterdir())
    image = nib.load(mask)
    voxels = np.asanyarray(image.dataobj).copy()
    voxels[0, 0, 0] = 1 - voxels[0, 0, 0]
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), mask)
    capsys.readouterr()
    assert same_results.report(baseline, found_in(same_results, copy)) == 1
    said = capsys.readouterr().out
    assert said.count("differs") == 1
    assert f"segment/masks/cldf/{mask.name}" in said


def test_packing_times_and_speeds_are_no_results(
    same_results: ModuleType, debug_run: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "debug"
    shutil.copytree(debug_run.folder, copy)
    metrics = copy / "train-cam" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"time": 1', '"time": 2'))
    (copy / "train-cam" / "seconds.json").write_text('{"seconds": 12}')
    assert same_results.digests(copy) == same_results.digests(debug_run.folder)
