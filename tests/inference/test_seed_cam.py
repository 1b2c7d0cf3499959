import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cldf_dist.__main__ import main
from cldf_dist.config import Config, load
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.saliency_agreement import saliency_of
from cldf_dist.inference.seed_cam import FALLBACK, best_map, map_agreement, patch_logit_agreement
from cldf_dist.method.cam import METHODS, class_activation_maps
from cldf_dist.runs.run import Run

STORE = Path("cache") / "features.zarr"
EARLIER = (
    "prepare", "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
)  # fmt: skip


@pytest.fixture
def config(debug_run: Any) -> Config:
    return load([debug_run.words[0]], debug_run.words[1:])


@pytest.fixture
def nets(config: Config) -> FrozenNets:
    return FrozenNets.load(config, Run(config, "cache", ()))


@pytest.fixture
def table(debug_run: Any) -> SliceTable:
    return ShardSet(debug_run.folder / "prepare").split("train")


def correlation_of(maps: Any, others: Any, table: SliceTable, rows: Any) -> float:
    inside = body_mask(table.read_images(rows))
    pairs = zip(np.asarray(maps), np.asarray(others), inside, strict=True)
    return float(np.mean([np.corrcoef(one[i], other[i])[0, 1] for one, other, i in pairs]))


def test_the_cache_takes_the_map_that_agrees_best_with_the_diffusion_model(
    debug_run: Any, config: Config, nets: FrozenNets, table: SliceTable
) -> None:
    about = FeatureCache(debug_run.folder / STORE).attributes["seed_cam"]
    rows = np.flatnonzero(table.labels == 1)
    assert 0 < len(rows) <= 128
    pixels, keys = torch.from_numpy(table.read_images(rows)), [table.keys[row] for row in rows]
    saliency = saliency_of(nets.diffusion, nets.schedule, pixels, keys)
    maps = class_activation_maps(nets.cam, pixels, config.cam.layer, METHODS)
    for method in METHODS:
        expected = correlation_of(maps[method].detach(), saliency, table, rows)
        assert about["agreement"]["saliency"][method] == pytest.approx(expected, abs=1e-3)
    assert (about["map"], about["judged_by"]) == best_map(about["agreement"])
    cache = FeatureCache(debug_run.folder / STORE)
    for name in ("cache/DONE", "evaluate/summary.json"):
        assert json.loads((debug_run.folder / name).read_text())["seed_cam"] == about["map"]
    for place, row in enumerate(rows.tolist()):
        stored = cache.read("cam", row).astype(np.float32)
        chosen = maps[about["map"]][place].detach().numpy()
        np.testing.assert_allclose(stored, chosen, rtol=2e-3, atol=1e-4)


def test_without_labels_in_the_diffusion_model_the_gradient_map_is_asked(
    debug_run: Any, config: Config, nets: FrozenNets, table: SliceTable
) -> None:
    unconditional = replace(config, diffusion=replace(config.diffusion, label_dropout=1.0))
    agreement = map_agreement(unconditional, nets, table)
    assert agreement["saliency"] == dict.fromkeys(METHODS)
    assert best_map(agreement)[1] == "gradient_map"
    rows = np.flatnonzero(table.labels == 1)
    cache = FeatureCache(debug_run.folder / STORE)
    chosen = cache.attributes["seed_cam"]["map"]
    cams, gradients, patch_logits = (
        np.stack([cache.read(name, int(row)) for row in rows]).astype(np.float64)
        for name in ("cam", "gradient_map", "patch_logits")
    )
    for view, values in (
        ("gradient_map", gradients),
        ("patch_logits", 1 / (1 + np.exp(-patch_logits))),
    ):
        expected = correlation_of(cams, values, table, rows)
        assert agreement[view][chosen] == pytest.approx(expected, abs=5e-3)


def test_cldf_plus_is_left_out_where_evidence_and_map_show_different_things(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "cache")
    seed_cam = FeatureCache(run.folder / STORE).attributes["seed_cam"]
    found = patch_logit_agreement(seed_cam)
    assert found == seed_cam["agreement"]["patch_logits"][seed_cam["map"]]
    assert found is not None
    assert -1 < found < 1
    for least, is_there in ((found + 1e-3, False), (found - 1e-3, True)):
        words = [*run.words, f"plus.min_agreement={least}"]
        assert main(["train-decoder", *words]) == 0
        said = capsys.readouterr().err
        assert ("cldf_plus is left out" in said and "plus.min_agreement=-1" in said) != is_there
        assert (run.folder / "train-decoder" / "cldf_plus" / "DONE").exists() == is_there
        shutil.rmtree(run.folder / "train-decoder")
    assert patch_logit_agreement({}) is None, "of a store before there was any"


def with_attributes(store: Path, **changed: Any) -> dict[str, Any]:
    """Change what a store says of itself; what it said before."""
    path = store / "zarr.json"
    plain = json.loads(path.read_text())
    before = dict(plain["attributes"])
    plain["attributes"].update(changed)
    path.write_text(json.dumps(plain))
    return before


def test_jobs_that_make_parts_take_the_map_that_the_first_began_with(
    debug_run: Any, config: Config, nets: FrozenNets, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    store = run.folder / STORE
    assert main(["cache", *run.words, "cache.part=1/2"]) == 0
    begun = FeatureCache(store).attributes["seed_cam"]
    other = next(method for method in METHODS if method != begun["map"])
    with_attributes(store, seed_cam={**begun, "map": other})
    assert main(["cache", *run.words, "cache.part=2/2"]) == 0
    assert main(["cache", *run.words]) == 0
    assert json.loads((run.folder / "cache" / "DONE").read_text())["seed_cam"] == other
    cache, whole = FeatureCache(store), FeatureCache(debug_run.folder / STORE)
    slices = cached_slices(ShardSet(run.folder / "prepare"))
    row = len(cache) - 1
    table, place = slices.place(row)
    pixels = torch.from_numpy(table.read_images([place]))
    maps = class_activation_maps(nets.cam, pixels, config.cam.layer, (other,))
    np.testing.assert_allclose(
        cache.read("cam", row), maps[other][0].detach().numpy(), rtol=2e-3, atol=1e-4
    )
    np.testing.assert_array_equal(cache.read("cam", 0), whole.read("cam", 0))


def test_a_choice_that_is_lost_with_its_file_is_made_again(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "cache")
    (run.folder / STORE / "zarr.json").write_text("{")
    (run.folder / "cache" / "DONE").unlink()
    assert main(["cache", *run.words, "cache.verify=true"]) == 0
    before, now = (FeatureCache(one.folder / STORE).attributes for one in (debug_run, run))
    assert now["seed_cam"] == before["seed_cam"]


def test_a_map_that_is_named_is_taken(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    assert main(["cache", *run.words, "seeds.cam=layercam"]) == 0
    seed_cam = FeatureCache(run.folder / STORE).attributes["seed_cam"]
    assert (seed_cam["map"], seed_cam["judged_by"]) == ("layercam", "seeds.cam")
    assert seed_cam["agreement"]["saliency"] == dict.fromkeys(METHODS), "not asked"
    assert json.loads((run.folder / "cache" / "DONE").read_text())["seed_cam"] == "layercam"


def test_where_saliency_agrees_with_no_map_the_gradient_map_is_asked() -> None:
    gradients = {"gradcam": -0.07, "gradcam_pp": 0.26, "layercam": 0.09}
    weak = {"gradcam": 0.19, "gradcam_pp": 0.05, "layercam": None}
    clear = {"gradcam": 0.5, "gradcam_pp": 0.2, "layercam": 0.5}
    unknown = dict.fromkeys(METHODS)
    for saliency, expected in (
        (weak, ("gradcam_pp", "gradient_map")),
        (clear, ("gradcam", "saliency")),
        (unknown, ("gradcam_pp", "gradient_map")),
    ):
        assert best_map({"saliency": saliency, "gradient_map": gradients}) == expected
    assert best_map({"saliency": unknown, "gradient_map": unknown})[0] == FALLBACK
