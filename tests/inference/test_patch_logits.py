"""The evidence of small windows: threshold and seeds of `cldf_plus`, and whose masks a run has."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finished_run import make_run, settings

from cldf_dist.__main__ import main
from cldf_dist.cli.multi_object import mask_method
from cldf_dist.cli.new_scans import load_segmenter
from cldf_dist.config import Config, load
from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.formats.nifti import read_nifti
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.seed_sources import PatchLogitLabels, patch_logit_labels
from cldf_dist.methods import CLDF_PLUS, PATCH_FEATURES, Role, names_of
from cldf_dist.scoring.masks import PatientScores, smoothed_over_slices
from cldf_dist.stages.segment import _mask_method
from cldf_dist.training.export import read_description

METHODS = names_of(Role.BASELINE, Role.OURS)
UPPER_BOUNDS = names_of(Role.UPPER_BOUND)

STORE = Path("cache") / "features.zarr"
TRAINED = (
    "prepare", "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
)  # fmt: skip
LATER = ("cache", "train-decoder")
QUICK = ("cg_diff.enabled=false", "cg_cdm.enabled=false", "evaluate.upper_bound=false")
LABELS = (0, 1, -1, 0)
NOTHING = -np.inf  # outside the subject


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Four slices of 2 x 3 pixels, of which the first is outside the subject."""
    folder = tmp_path_factory.mktemp("cache") / "features.zarr"
    square = ((2, 3), "float16")
    shapes = {"patch_logits": square, "cam": square, "label": ((), "int8")}
    cache = FeatureCache.create(folder, 4, shapes, slices_per_shard=4, attributes={})
    patch_logits = np.array([[[NOTHING, -2, 0.5], [0.5, 1, 3]]] * 4)
    # within the subject from 1 to 5; outside it does not count
    cam = np.array([[[9, 1, 5], [5, 2, 3]]] * 4)
    values = {"patch_logits": patch_logits, "cam": cam, "label": np.array(LABELS)}
    cache.write_shard(0, list("abcd"), values)
    return cache


def test_seeds_are_object_above_the_cut_and_background_in_negative_slices(
    made_up: FeatureCache,
) -> None:
    labels = PatchLogitLabels(made_up, 0.5, 0)
    assert labels.labels(0).tolist() == [[-1, 0, 0], [0, 0, 0]], (
        "negative, above the threshold or not"
    )
    assert labels.labels(1).tolist() == [[-1, -1, -1], [-1, 1, 1]], (
        "at the threshold is not above it"
    )
    assert (labels.labels(2) == -1).all(), "its label is not known"
    assert labels.labels(1).dtype == np.int8
    assert count_labels(labels, np.arange(4)).tolist() == [[5, 0], [0, 2], [0, 0], [5, 0]]
    nothing = PatchLogitLabels(made_up, 3.0, 0)
    assert (nothing.labels(1) == -1).all()


def test_object_seeds_are_where_the_activation_map_agrees(made_up: FeatureCache) -> None:
    assert PatchLogitLabels(made_up, 0.5, 0.3).labels(1).tolist() == [[-1, -1, -1], [-1, -1, 1]]
    assert PatchLogitLabels(made_up, 0.0, 0.3).labels(1).tolist() == [[-1, -1, 1], [1, -1, 1]]
    assert PatchLogitLabels(made_up, 0.5, 0.5).labels(1).max() == -1, (
        "at the threshold is not above it"
    )
    assert PatchLogitLabels(made_up, 0.5, 0.3).labels(0).tolist() == [[-1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("body_fraction", [0.01, 0.1, 0.3])
def test_the_cut_leaves_at_most_the_share_of_negative_pixels_above(
    debug_run: Any, body_fraction: float
) -> None:
    words = [*debug_run.words[1:], f"plus.negative_fraction={body_fraction}"]
    shards = ShardSet(debug_run.folder / "prepare")
    train, validation = shards.split("train"), shards.split("validation")
    cache = FeatureCache(debug_run.folder / STORE)
    threshold = patch_logit_labels(
        load([debug_run.words[0]], words), cache, train, validation
    ).threshold
    pool = []
    for row in np.flatnonzero(validation.labels == 0):
        inside = body_mask(validation.read_image(int(row)))
        patch_logits = cache.read("patch_logits", len(train) + int(row))
        np.testing.assert_array_equal(np.isfinite(patch_logits), inside)
        pool.append(patch_logits[inside].astype(np.float64))
    scores = np.concatenate(pool)
    assert (scores > threshold).mean() <= body_fraction
    assert (scores >= threshold).mean() > body_fraction, "no lower threshold would do"


def test_without_negative_slices_the_way_out_is_told(made_up: FeatureCache) -> None:
    table: Any = SimpleNamespace(labels=np.array([1, 1, -1]))
    with pytest.raises(ValueError, match=r"there is none; set patch_classifier\.enabled=false"):
        patch_logit_labels(Config(), made_up, [], table)  # type: ignore[arg-type]


def test_the_cut_of_the_training_is_kept_with_it(debug_run: Any) -> None:
    done = json.loads((debug_run.folder / "train-decoder" / "DONE").read_text())
    config = load([debug_run.words[0]], debug_run.words[1:])
    shards = ShardSet(debug_run.folder / "prepare")
    table, validation = shards.split("train"), shards.split("validation")
    cache = FeatureCache(debug_run.folder / STORE)
    labels = patch_logit_labels(config, cache, table, validation)
    assert done["patch_logit_threshold"] == labels.threshold
    plus = json.loads((debug_run.folder / "train-decoder" / CLDF_PLUS / "DONE").read_text())
    num_object = count_labels(labels, np.arange(len(table)))[:, 1]
    assert plus["slices_with_object_seeds"] == (num_object > 0).sum() > 0


@pytest.mark.parametrize(
    ("found_by", "chosen"),
    [(("cldf",), "cldf"), ((CLDF_PLUS,), CLDF_PLUS), (("cldf", CLDF_PLUS), "cldf"), ((), "cldf")],
    ids=["cldf", "cldf_plus", "equal", "neither"],
)
def test_masks_are_of_the_row_with_the_better_weak_validation(
    tmp_path: Path, found_by: tuple[str, ...], chosen: str
) -> None:
    """A row that finds nothing tells no slice from another; of equals the first."""
    config = settings(tmp_path)
    make_run(config)
    folder = config.run_folder / "segment" / "scores"
    scores = PatientScores.load(folder, "validation_0")
    truth = scores.scores["supervised_decoder"]
    for row in ("cldf", CLDF_PLUS):
        scores.scores[row] = truth if row in found_by else np.zeros_like(truth)
    scores.save(folder)
    shards = ShardSet(config.run_folder / "prepare")
    thresholds = {"gradcam": 0.5, "cldf": 0.5, CLDF_PLUS: 0.5}
    assert _mask_method(config, shards, folder, thresholds) == chosen
    assert _mask_method(config, shards, folder, {"cldf": 0.5}) == "cldf", "the only one there is"


@pytest.mark.parametrize("row", ["cldf", CLDF_PLUS])
def test_new_scans_and_the_page_get_the_row_that_was_asked_for(
    debug_run: Any, tmp_path: Path, row: str
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED, *LATER)
    words = [*run.words, f"segment.mask_method={row}", *QUICK[:2]]
    for stage in ("segment", "evaluate", "report"):
        assert main([stage, *words]) == 0
    segment = run.folder / "segment"
    rule = json.loads((segment / "thresholds.json").read_text())
    assert rule["mask_method"] == mask_method(segment) == row
    segmenter = load_segmenter(run.folder)
    assert (segmenter.method, segmenter.threshold) == (row, rule["thresholds"][row])
    for path in (segment / "probability").iterdir():
        probability, _ = read_nifti(path)
        mask, _ = read_nifti(segment / "masks" / row / path.name)
        sure = np.abs(probability - 0.5) > 1e-6
        np.testing.assert_array_equal(mask[sure] > 0, probability[sure] > 0.5)
    summary = json.loads((run.folder / "evaluate" / "summary.json").read_text())
    assert summary["mask_method"] == row


def test_without_the_patch_classifier_its_rows_are_nowhere(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED[:-1])
    assert main(["run", *run.words, "patch_classifier.enabled=false", *QUICK]) == 0
    assert not (run.folder / "train-patch-classifier" / "net.safetensors").exists()
    assert not {"patch_logits", "patch"} & {path.name for path in (run.folder / STORE).iterdir()}
    rows = [
        row for row in METHODS if row not in ("cg_diff", "cg_cdm", "patch_classifier", CLDF_PLUS)
    ]
    rule = json.loads((run.folder / "segment" / "thresholds.json").read_text())
    assert list(rule["thresholds"]) == rows
    assert rule["mask_method"] == "cldf"
    summary = json.loads((run.folder / "evaluate" / "summary.json").read_text())
    assert list(summary["strict"]["methods"]) == rows
    assert summary["strict"]["comparisons_plus"] == summary["seeds_plus"] == {}
    assert load_segmenter(run.folder).method == "cldf"
    nets = [f.parent.name for f in (run.folder / "train-decoder").rglob("net.safetensors")]
    assert nets == ["train-decoder"]
    own, other = (r.folder / "train-decoder" / "net.safetensors" for r in (run, debug_run))
    assert own.read_bytes() == other.read_bytes(), "cldf itself is the same"


def test_without_the_patch_tap_cldf_plus_learns_from_diffusion_alone(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED)
    words = [*run.words, "plus.patch_tap=false", *QUICK[:2]]
    assert main(["run", *words]) == 0
    arrays = {path.name for path in (run.folder / STORE).iterdir()}
    assert "patch_logits" in arrays
    assert "patch" not in arrays
    decoder = run.folder / "train-decoder"
    assert not (decoder / PATCH_FEATURES).exists()
    for row in (CLDF_PLUS, *UPPER_BOUNDS):
        assert list(read_description(decoder / row)["tap_channels"]) == ["up0.1", "up1.1"]
    rule = json.loads((run.folder / "segment" / "thresholds.json").read_text())
    assert set(rule["thresholds"]) == {*METHODS, *UPPER_BOUNDS} - {"cg_diff", "cg_cdm"}
    with_tap = debug_run.folder / "train-decoder" / CLDF_PLUS
    assert list(read_description(with_tap)["tap_channels"]) == ["up0.1", "up1.1", "patch"]


def test_without_any_object_seed_cldf_plus_is_left_out_and_the_run_goes_on(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED, "cache")
    cache = FeatureCache(run.folder / STORE)
    for shard in range(cache.num_shards):
        rows = cache.slices_of(shard)
        values = {n: np.stack([cache.read(n, row) for row in rows]) for n in cache.names}
        values["patch_logits"][values["label"] == 1] -= 100  # nothing speaks for the object
        keys = [cache.keys[row] for row in rows]
        cache.write_shard(shard, keys, values)
    assert main(["run", *run.words, *QUICK]) == 0
    assert "cldf_plus is left out: no pixel of a positive" in capsys.readouterr().err
    rule = json.loads((run.folder / "segment" / "thresholds.json").read_text())
    assert set(rule["thresholds"]) == {*METHODS} - {CLDF_PLUS, "cg_diff", "cg_cdm"}
    assert rule["mask_method"] == "cldf"
    shutil.rmtree(run.folder / "segment")
    assert main(["segment", *run.words, *QUICK, "segment.mask_method=cldf_plus"]) == 1
    assert "segment.mask_method=cldf_plus is no method of this run" in capsys.readouterr().err
    assert not (run.folder / "segment" / "scores").exists(), "told before any patient is scored"
    assert main(["segment", *run.words, *QUICK, "segment.mask_method=auto"]) == 0


def test_the_gate_hears_the_neighbouring_slices() -> None:
    found = smoothed_over_slices(np.array([0.5, 0.9, 0.5], np.float32))
    half = 1 / (1 + math.exp(-math.log(9) / 2))  # the logit of 0.9 is log 9, of 0.5 it is 0
    quarter = 1 / (1 + math.exp(-math.log(9) / 4))
    np.testing.assert_allclose(found, [quarter, half, quarter], rtol=1e-6)
    np.testing.assert_allclose(
        smoothed_over_slices(np.float32([0, 1])), [0.0306, 0.9694], atol=1e-4
    )
    np.testing.assert_allclose(smoothed_over_slices(np.float32([0.3])), [0.3], rtol=1e-6)


def test_a_store_that_is_gone_leaves_the_rest_of_the_evaluation(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED, *LATER, "segment")
    shutil.rmtree(run.folder / STORE)
    assert main(["evaluate", *run.words]) == 0
    assert "the seeds of cldf_plus are not scored" in capsys.readouterr().err
    summary, whole = (
        json.loads((r.folder / "evaluate" / "summary.json").read_text()) for r in (run, debug_run)
    )
    assert summary.pop("seeds_plus") == {}
    assert whole.pop("seeds_plus")["slices"] > 0
    assert summary == whole
