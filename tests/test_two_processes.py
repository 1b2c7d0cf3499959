"""Two gloo ranks under accelerate's launcher do what one process does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from cldf_dist.cli.new_scans import load_segmenter
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.formats.nifti import write_nifti

ROOT = Path(__file__).parents[1]
LAUNCH = (
    "-m", "accelerate.commands.launch",
    "--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml"),
    "-m", "cldf_dist",
)  # fmt: skip
TRAININGS = (
    "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
    "train-decoder/supervised_decoder", "train-decoder/supervised_plus",
)  # fmt: skip

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.slow


def outputs(folder: Path) -> set[str]:
    """Relative names of all files that a run leaves, without locks and words between processes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not Path(name).name.startswith(".")}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does(
    debug_run: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    """One test, because test workers would launch the two processes once for each."""
    run = debug_run.copy_to(tmp_path)
    done = subprocess.run(
        [sys.executable, *LAUNCH, "run", *run.words],
        env={**environment, "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert outputs(run.folder) == outputs(debug_run.folder)
    for stage in TRAININGS:
        check_same_metrics(debug_run.folder / stage, run.folder / stage)
        check_same_net(debug_run.folder / stage, run.folder / stage)
    # a map that differs in its last bit may move a seed, and so the pixels that are drawn
    for row in (".", "cldf_plus", "patch_features"):
        decoders = [folder / "train-decoder" / row for folder in (debug_run.folder, run.folder)]
        check_same_metrics(*decoders, tolerance=0.05)
    thresholds = [
        json.loads((r.folder / "train-decoder/DONE").read_text()) for r in (debug_run, run)
    ]
    assert thresholds[0]["patch_logit_threshold"] == pytest.approx(
        thresholds[1]["patch_logit_threshold"], abs=1e-2
    )
    check_same_cache(debug_run.folder / "cache", run.folder / "cache")
    check_same_geometry(debug_run.folder / "segment", run.folder / "segment")
    provenance = json.loads((run.folder / "segment" / "provenance.json").read_text())
    assert [start["processes"] for start in provenance["starts"]] == [2]


def check_same_metrics(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    mine, theirs = metrics(one), metrics(two)
    assert [set(line) for line in mine] == [set(line) for line in theirs]
    for line, other in zip(mine, theirs):
        assert line["step"] == other["step"]
        for name in ("train/loss", "train/learning_rate", "validation/loss"):
            if name in line:
                close = pytest.approx(other[name], rel=tolerance, abs=tolerance)
                assert line[name] == close, (one, name)
        if "train/grad_norm" in line:
            close = pytest.approx(other["train/grad_norm"], rel=100 * tolerance)
            assert line["train/grad_norm"] == close, one


def check_same_net(one: Path, two: Path) -> None:
    mine, theirs = load_file(one / "net.safetensors"), load_file(two / "net.safetensors")
    assert set(mine) == set(theirs)
    for name in mine:
        np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-2, atol=2e-3, err_msg=name)


def check_same_cache(one: Path, two: Path) -> None:
    mine, theirs = FeatureCache(one / "features.zarr"), FeatureCache(two / "features.zarr")
    assert mine.keys == theirs.keys
    assert all(theirs.verify(row) for row in range(len(theirs)))
    np.testing.assert_array_equal(mine.column("label"), theirs.column("label"))
    np.testing.assert_allclose(mine.column("probability"), theirs.column("probability"), atol=1e-2)
    moved = [
        (mine.read("seeds", row) != theirs.read("seeds", row)).mean() for row in range(len(mine))
    ]
    assert np.mean(moved) < 1e-3
    for row in range(len(mine)):  # -inf outside the subject
        patch_logits = [
            cache.read("patch_logits", row).astype(np.float32) for cache in (mine, theirs)
        ]
        np.testing.assert_allclose(*patch_logits, rtol=1e-2, atol=1e-2)


def check_same_geometry(one: Path, two: Path) -> None:
    for path in (one / "probability").glob("*.nii.gz"):
        mine, theirs = nib.load(path), nib.load(two / "probability" / path.name)
        np.testing.assert_array_equal(mine.affine, theirs.affine)
        assert mine.shape == theirs.shape


def test_processes_that_would_train_apart_are_an_error(
    debug_run: Any, tmp_path: Path, start: Start
) -> None:
    """Without ACCELERATE_USE_CPU accelerate's processes do not find each other on CPUs."""
    run = debug_run.copy_to(tmp_path, "prepare")
    process = start(*LAUNCH, "train-cam", *run.words)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "started 2 processes, but accelerate would train each alone; on CPUs set" in errors
    assert not (run.folder / "train-cam" / "DONE").exists()
    assert not (run.folder / "train-cam" / "checkpoints").exists()


def test_new_scans_are_dealt_out_to_two_processes(
    debug_run: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The masks are those of one process. The main one tells of a scan that the other could not
    read, and neither waits for ever where there are no scans at all."""
    for seed, name in enumerate(("ann", "bob", "dan", "eve")):
        image = np.random.default_rng(seed).normal(500, 100, (4, 24, 24, 3)).astype(np.float32)
        for number, values in enumerate(image):
            write_nifti(tmp_path / "in" / f"{name}_{number:04d}.nii.gz", values, np.eye(4))
    damaged = tmp_path / "in" / "bob_0002.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:50])
    for source, error in (("in", "cldf: error: bob: "), ("absent", "cldf: error: ")):
        done = subprocess.run(
            [
                *(sys.executable, *LAUNCH, "segment", *debug_run.words),
                *(f"input={tmp_path / source}", f"output={tmp_path / 'out'}"),
            ],
            env={**environment, "ACCELERATE_USE_CPU": "true"},
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 1, done.stderr[-5000:]
        assert error in done.stderr
        assert done.stderr.count("cldf: error: bob: ") == (source == "in")
    segmenter = load_segmenter(debug_run.folder)
    for name in ("ann", "dan", "eve"):
        segmenter.segment(tmp_path / "in" / f"{name}_0000.nii.gz").save(tmp_path / "alone")
    expected = sorted((tmp_path / "alone").iterdir())
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [p.name for p in expected]
    for path in expected:
        mine = nib.load(tmp_path / "out" / path.name).get_fdata()
        np.testing.assert_allclose(mine, nib.load(path).get_fdata(), atol=1e-5)
