import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cldf_dist.__main__ import main
from cldf_dist.cli.multi_object import mask_method
from cldf_dist.config import load
from cldf_dist.data.features.encoding import to_stored
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.formats.nifti import read_nifti
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.patch_maps import PATCH_TAP, PatchMaps, patch_maps
from cldf_dist.inference.score_maps import decoder_taps, prototype_scores
from cldf_dist.inference.segmenter import Segmenter
from cldf_dist.method.features import extract_features
from cldf_dist.methods import (
    CLDF_PLUS,
    PATCH_FEATURES,
    RAW_PATCHES,
    SUPERVISED,
    Role,
    names_of,
    scored_names,
)
from cldf_dist.runs.run import Run
from cldf_dist.scoring.masks import PatientScores
from cldf_dist.stages.segment import patients_of_this_rank
from cldf_dist.system.memory_format import fast_memory_format

METHODS = names_of(Role.BASELINE, Role.OURS)
UPPER_BOUNDS = names_of(Role.UPPER_BOUND)

EARLIER = (
    "prepare", "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
    "cache", "train-decoder",
)  # fmt: skip
ALL_ROWS = (*METHODS, PATCH_FEATURES, *UPPER_BOUNDS)  # of the debug run
TAPS = ("up0.1", "up1.1", PATCH_TAP)


def test_features_of_new_slices_are_those_of_the_cache(debug_run: Any) -> None:
    """Validation slices are in the cache; here they are extracted one by one, as if new."""
    config = load([debug_run.words[0]], debug_run.words[1:])
    prepared = ShardSet(debug_run.folder / "prepare")
    cache = FeatureCache(debug_run.folder / "cache" / "features.zarr")
    nets = FrozenNets.load(config, Run(config, "segment", ()))
    first, table = len(prepared.split("train")), prepared.split("validation")
    assert len(cache) == first + len(table)
    for row in range(0, len(table), 3):
        image = torch.from_numpy(table.read_image(row))[None]
        found = extract_features(
            nets.diffusion, nets.schedule, image, [table.keys[row]], config.features
        )
        assert set(found) == {"up0.1", "up1.1"}
        for tap, features in found.items():
            stored = cache.read(tap, first + row)
            new = to_stored(tap, features, "float16")[tap][0].numpy()
            assert new.dtype == stored.dtype == np.float16
            # another batch size may round the last bit of a float16 otherwise
            np.testing.assert_allclose(new, stored, rtol=2e-3, atol=2e-3)


def segmenter_of(run: Any, *words: str) -> Segmenter:
    config = load([run.words[0]], [*run.words[1:], *words])
    return Segmenter.load(config, Run(config, "segment", ()))


def cached_slices_of(run: Any, rows: range) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Keys and images of these rows of the cache."""
    prepared = ShardSet(run.folder / "prepare")
    train, validation = (prepared.split(name) for name in ("train", "validation"))
    placed = [(train, row) if row < len(train) else (validation, row - len(train)) for row in rows]
    images = np.stack([table.read_image(row) for table, row in placed])
    return [table.keys[row] for table, row in placed], images


def cached_taps(run: Any, rows: range) -> dict[str, torch.Tensor]:
    """{tap: (slices, levels x channels, h, w)} as the decoder's training reads them."""
    cache = FeatureCache(run.folder / "cache" / "features.zarr")
    taps = {}
    for tap in TAPS:
        stored = np.stack([cache.read(tap, row) for row in rows])  # levels, h, w, channels
        taps[tap] = torch.from_numpy(stored).float().permute(0, 1, 4, 2, 3).flatten(1, 2)
    return taps


def patches_of(segmenter: Segmenter, images: np.ndarray[Any, Any]) -> PatchMaps:
    """As `Segmenter.score` makes them."""
    net = segmenter.nets.patch_classifier
    assert net is not None
    pixels = torch.from_numpy(images).contiguous(
        memory_format=fast_memory_format(torch.device("cpu"))
    )
    return patch_maps(net, pixels, torch.from_numpy(body_mask(images)))


def test_decoders_see_the_very_features_of_the_cache(debug_run: Any) -> None:
    """Bit for bit where the batch is that of the cache, else to within batching's round-off."""
    cache = FeatureCache(debug_run.folder / "cache" / "features.zarr")
    segmenter = segmenter_of(debug_run)
    for shard in (0, cache.num_shards - 1):
        rows = cache.slices_of(shard)
        keys, images = cached_slices_of(debug_run, rows)
        stored = cached_taps(debug_run, rows)
        found = decoder_taps(
            segmenter.config,
            segmenter.nets,
            torch.from_numpy(images),
            keys,
            patches_of(segmenter, images),
        )
        assert set(found) == set(stored)
        alone = decoder_taps(
            segmenter.config,
            segmenter.nets,
            torch.from_numpy(images[-1:]),
            keys[-1:],
            patches_of(segmenter, images[-1:]),
        )
        for tap, features in found.items():
            assert features.dtype == torch.float32
            assert torch.equal(features, stored[tap]), tap
            torch.testing.assert_close(alone[tap][0], stored[tap][-1], rtol=2e-3, atol=2e-3)
            assert torch.equal(alone[tap], alone[tap].half().float()), "rounded as the cache is"


def test_evidence_of_new_slices_is_that_of_the_cache(debug_run: Any) -> None:
    """Bit for bit in the cache's batch; the row `patch_classifier` is its probability."""
    cache = FeatureCache(debug_run.folder / "cache" / "features.zarr")
    segmenter = segmenter_of(debug_run)
    rows = cache.slices_of(0)
    keys, images = cached_slices_of(debug_run, rows)
    stored = np.stack([cache.read("patch_logits", row) for row in rows])
    found = patches_of(segmenter, images).patch_logits
    np.testing.assert_array_equal(found.half().numpy(), stored)
    np.testing.assert_array_equal(np.isfinite(stored), body_mask(images))
    assert stored[np.isfinite(stored)].std() > 1e-3, "or nothing was compared"
    scores = segmenter.score("someone", keys, images, methods=("patch_classifier",)).scores
    np.testing.assert_array_equal(scores["patch_classifier"], found.sigmoid().numpy())


def test_scores_are_those_of_cached_features_decoded_in_the_naive_order(debug_run: Any) -> None:
    segmenter = segmenter_of(debug_run, "segment.tile_pixels=300")
    rows = FeatureCache(debug_run.folder / "cache" / "features.zarr").slices_of(0)
    keys, images = cached_slices_of(debug_run, rows)
    assert set(segmenter.decoders) == {"cldf", CLDF_PLUS, PATCH_FEATURES, *UPPER_BOUNDS}
    found = segmenter.score("someone", keys, images, methods=tuple(segmenter.decoders)).scores
    upsampled = {
        name: torch.nn.functional.interpolate(tap, size=images.shape[2:], mode="bilinear")
        for name, tap in cached_taps(debug_run, rows).items()
    }
    for row, (decoder, prototypes) in segmenter.decoders.items():
        taps = [upsampled[name] for name in decoder.tap_channels]
        pixels = torch.cat(taps, 1).movedim(1, -1).flatten(0, 2)
        with torch.no_grad():
            cosines = decoder(pixels) @ prototypes.T
        expected = ((cosines[:, 1] - cosines[:, 0]) / 2 + 1) / 2
        np.testing.assert_allclose(found[row].ravel(), expected, atol=2e-5, err_msg=row)
        assert found[row].std() > 1e-3, "or nothing was compared"


def test_scores_do_not_depend_on_the_tiles(debug_run: Any) -> None:
    rows = range(5)
    taps = cached_taps(debug_run, rows)
    decoder, prototypes = segmenter_of(debug_run).decoders["cldf"]
    with torch.no_grad():
        whole = prototype_scores(decoder, prototypes, taps, (32, 32), tile_pixels=10**6)
        assert whole.shape == (5, 32, 32)
        for tile_pixels in (7, 100, 1024, 2500):  # parts of a row, rows, a slice, slices
            tiled = prototype_scores(decoder, prototypes, taps, (32, 32), tile_pixels=tile_pixels)
            torch.testing.assert_close(tiled, whole, atol=2e-6, rtol=0)


def test_several_decoders_share_one_extraction(debug_run: Any) -> None:
    segmenter = segmenter_of(debug_run)
    keys, images = cached_slices_of(debug_run, range(3))
    passes = []
    hook = segmenter.nets.diffusion.register_forward_pre_hook(lambda *_: passes.append(1))
    for decoders in (("cldf",), ("cldf", CLDF_PLUS, SUPERVISED)):
        segmenter.score("someone", keys, images, methods=decoders)
    hook.remove()
    assert len(passes) == 2 * len(segmenter.config.features.timesteps)


def test_patients_are_dealt_out_by_their_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    num_slices = {"b": 1, "a": 10, "c": 1, "d": 8, "e": 1}
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        shares.append(patients_of_this_rank(num_slices))
    assert shares == [["a", "e"], ["d", "b", "c"]]
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert patients_of_this_rank(num_slices) == ["d"]
    monkeypatch.setenv("RANK", "6")
    assert patients_of_this_rank(num_slices) == []


def test_scores_are_kept_for_validation_and_test_patients(debug_run: Any) -> None:
    prepared = ShardSet(debug_run.folder / "prepare")
    folder = debug_run.folder / "segment" / "scores"
    expected = sorted([*prepared.patients["validation"], *prepared.patients["test"]])
    assert sorted(path.stem for path in folder.iterdir()) == expected
    for patient in expected:
        scores = PatientScores.load(folder, patient)
        assert set(scores.scores) == set(ALL_ROWS)
        for maps in scores.scores.values():
            assert maps.shape == scores.body_mask.shape == (len(scores.probability), 32, 32)
            assert np.isfinite(maps).all()
        assert 0 <= scores.scores["cldf"].min() <= scores.scores["cldf"].max() <= 1


def test_each_cut_is_exceeded_by_the_share_of_negative_validation_pixels(debug_run: Any) -> None:
    prepared = ShardSet(debug_run.folder / "prepare")
    table = prepared.split("validation")
    stored = json.loads((debug_run.folder / "segment" / "thresholds.json").read_text())
    assert tuple(stored["thresholds"]) == ALL_ROWS
    for row, threshold in stored["thresholds"].items():
        pool = []
        for patient in prepared.patients["validation"]:
            scores = PatientScores.load(debug_run.folder / "segment" / "scores", patient)
            negative = table.labels[[name == patient for name in table.patients]] == 0
            pool.append(scores.scores[row][negative][scores.body_mask[negative]])
        above = float((np.concatenate(pool) > threshold).mean())
        assert above <= stored["negative_fraction"] + 1e-9
        assert (
            above > 0 or threshold == np.concatenate(pool).max() or row not in ("cldf", CLDF_PLUS)
        )


def test_the_mask_is_where_the_probability_exceeds_one_half(debug_run: Any) -> None:
    folder = debug_run.folder / "segment"
    for path in (folder / "probability").iterdir():
        probability, _ = read_nifti(path)
        mask, _ = read_nifti(folder / "masks" / mask_method(folder) / path.name)
        sure = np.abs(probability - 0.5) > 1e-6
        np.testing.assert_array_equal(mask[sure] > 0, probability[sure] > 0.5)


def test_an_interrupted_segmentation_scores_only_the_missing_patients(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "segment")
    folder = run.folder / "segment"
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "masks")
    missing, *kept = sorted((folder / "scores").iterdir())
    missing.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["segment", *run.words]) == 0
    assert missing.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    for path in (debug_run.folder / "segment" / "masks").rglob("*.nii.gz"):
        again = folder / path.relative_to(debug_run.folder / "segment")
        assert again.read_bytes() == path.read_bytes()


def test_slices_below_the_gate_are_emptied(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    assert main(["segment", *run.words, "segment.gate_probability=0.9999"]) == 0
    masks = list((run.folder / "segment" / "masks").rglob("*.nii.gz"))
    assert len(masks) == 3 * len(ALL_ROWS)
    assert not any(read_nifti(path)[0].any() for path in masks)


def test_the_reference_row_is_there_only_where_it_was_trained(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    shutil.rmtree(run.folder / "train-decoder" / SUPERVISED)
    config = load([run.words[0]], run.words[1:])
    rest = tuple(row for row in ALL_ROWS if row != SUPERVISED)
    assert Segmenter.load(config, Run(config, "segment", ())).methods == rest
    assert segmenter_of(debug_run).methods == ALL_ROWS


def test_raw_patches_beside_diffusion_features_are_a_row_of_their_own(
    debug_run: Any, tmp_path: Path
) -> None:
    """It knows the slice alone: without diffusion features it is the method itself."""
    trained = EARLIER[: EARLIER.index("cache")]
    run = debug_run.copy_to(tmp_path / "both", *trained)
    words = [*run.words, "features.taps=[up1.1,image3]", "evaluate.upper_bound=false"]
    for stage in ("cache", "train-decoder", "segment", "evaluate"):
        assert main([stage, *words]) == 0
    alone = debug_run.copy_to(tmp_path / "alone", *trained)
    for stage in ("cache", "train-decoder"):
        assert main([stage, *alone.words, "features.taps=[image3]"]) == 0
    own = run.folder / "train-decoder" / RAW_PATCHES / "net.safetensors"
    assert own.read_bytes() == (alone.folder / "train-decoder" / "net.safetensors").read_bytes()
    assert not (alone.folder / "train-decoder" / RAW_PATCHES).exists()
    rows = json.loads((run.folder / "segment" / "thresholds.json").read_text())["thresholds"]
    assert list(rows) == [*METHODS, RAW_PATCHES, PATCH_FEATURES]
    assert RAW_PATCHES in (run.folder / "evaluate" / "table.txt").read_text()
    assert main(["train-decoder", *words, "evaluate.controls=false"]) == 1  # another setting
    shutil.rmtree(run.folder / "train-decoder")
    assert main(["train-decoder", *words, "evaluate.controls=false"]) == 0
    assert not own.exists()


def test_only_the_rows_of_the_settings_are_in_the_run(debug_run: Any, tmp_path: Path) -> None:
    """From the masks to the report; a row that was not trained is no error."""
    assert set(scored_names()) == {*ALL_ROWS, RAW_PATCHES}
    run = debug_run.copy_to(tmp_path, *EARLIER)
    assert main(["run", *run.words, f"segment.methods=[{SUPERVISED},cldf,{RAW_PATCHES}]"]) == 0
    masks = run.folder / "segment" / "masks"
    assert sorted(path.name for path in masks.iterdir()) == ["cldf", SUPERVISED]
    summary = json.loads((run.folder / "evaluate" / "summary.json").read_text())
    assert list(summary["strict"]["methods"]) == ["cldf", SUPERVISED]
    for file in masks.glob("cldf/*.nii.gz"):
        same = debug_run.folder / "segment" / "masks" / "cldf" / file.name
        np.testing.assert_array_equal(read_nifti(file)[0], read_nifti(same)[0])
    assert list((run.folder / "report" / "overlays").glob("*.png"))


def test_rows_that_are_switched_off_are_nowhere(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    words = [*run.words, "cg_diff.enabled=false", "cg_cdm.enabled=false"]
    for stage in ("segment", "evaluate", "report"):
        assert main([stage, *words]) == 0
    rows = {*ALL_ROWS} - {"cg_diff", "cg_cdm"}
    folder = run.folder / "segment"
    assert set(json.loads((folder / "thresholds.json").read_text())["thresholds"]) == rows
    assert {path.name for path in (folder / "masks").iterdir()} == rows
    summary = json.loads((run.folder / "evaluate" / "summary.json").read_text())
    assert set(summary["strict"]["methods"]) == set(summary["strict"]["methods_otsu"]) == rows
    assert set(summary["slice_protocol"]["methods"]) == rows
    for path in (run.folder / "evaluate").iterdir():
        if path.suffix in (".csv", ".txt"):
            assert not re.search("cg_diff|cg_cdm", path.read_text()), path
    page = (run.folder / "report" / "report.html").read_text()
    assert not re.search("CG-Diff|CG-CDM", page), "only its list of settings knows them"


def test_only_the_rows_asked_for_are_scored_and_the_gate_is_always_there(debug_run: Any) -> None:
    config = load([debug_run.words[0]], debug_run.words[1:])
    table = ShardSet(debug_run.folder / "prepare").split("validation")
    keys, images = table.keys[:3], table.read_images([0, 1, 2])
    segmenter = Segmenter.load(config, Run(config, "segment", ()))
    everything = segmenter.score("someone", keys, images)
    assert tuple(everything.scores) == segmenter.methods
    for rows in (("cldf",), ("cg_cdm", "layercam")):
        some = segmenter.score("someone", keys, images, methods=rows)
        assert tuple(some.scores) == rows
        for row in rows:
            np.testing.assert_array_equal(some.scores[row], everything.scores[row])
        np.testing.assert_array_equal(some.probability, everything.probability)


@pytest.mark.parametrize("patient", ["phantom_000"])
def test_scores_do_not_depend_on_the_batch_size(debug_run: Any, patient: str) -> None:
    prepared = ShardSet(debug_run.folder / "prepare")
    table = prepared.split("train")
    patient = table.patients[0]
    rows = [row for row, name in enumerate(table.patients) if name == patient]
    keys, images = [table.keys[row] for row in rows], table.read_images(rows)
    scored = []
    for size in (2, 16):
        config = load([debug_run.words[0]], [*debug_run.words[1:], f"segment.batch_size={size}"])
        segmenter = Segmenter.load(config, Run(config, "segment", ()))
        scored.append(segmenter.score(patient, keys, images))
    for row, maps in scored[0].scores.items():
        np.testing.assert_allclose(maps, scored[1].scores[row], atol=2e-3, err_msg=row)
