import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cldf_dist.__main__ import main
from cldf_dist.config import load
from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import body_mask
from cldf_dist.inference import training_pixels
from cldf_dist.inference.loading import load_decoder
from cldf_dist.inference.seed_sources import MaskLabels, SeedLabels
from cldf_dist.inference.training_pixels import feature_statistics
from cldf_dist.methods import CLDF_PLUS, PATCH_FEATURES, SUPERVISED
from cldf_dist.nets.decoder import PixelDecoder

EARLIER = ("prepare", "cache")
DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")


@pytest.fixture
def pixels(debug_run: Any) -> TrainingPixels:
    cache = FeatureCache(debug_run.folder / "cache" / "features.zarr")
    rows = np.arange(len(ShardSet(debug_run.folder / "prepare").split("train")))
    labels = SeedLabels(cache)
    return TrainingPixels(cache, ("up0.1", "up1.1"), labels, rows, count_labels(labels, rows))


def test_statistics_are_those_of_the_training_slices(pixels: TrainingPixels) -> None:
    mean, spread = feature_statistics(pixels, seed=0)
    expected = []
    for tap in pixels.taps:
        stored = np.stack([pixels.cache.read(tap, int(row)) for row in pixels.slice_indices])
        flat = stored.astype(np.float64).transpose(0, 2, 3, 1, 4)
        expected.append(flat.reshape(-1, flat.shape[-2] * flat.shape[-1]))
    np.testing.assert_allclose(mean, np.concatenate([e.mean(0) for e in expected]), atol=1e-4)
    np.testing.assert_allclose(spread, np.concatenate([e.std(0) for e in expected]), rtol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 20.0, 1000.0])
def test_a_feature_that_never_changes_stays_out_of_the_way(tmp_path: Path, constant: float) -> None:
    """Divided by the rounding of its values it would drown all others."""
    shape = (1, 4, 4, 3)
    cache = FeatureCache.create(
        tmp_path / "features.zarr", 4, {"up0.1": (shape, "float16")}, slices_per_shard=4,
        attributes={},
    )  # fmt: skip
    values = np.random.default_rng(0).normal(size=(4, *shape))
    values[..., 1] = constant
    cache.write_shard(0, list("abcd"), {"up0.1": values})
    rows = np.arange(4)
    pixels = TrainingPixels(cache, ("up0.1",), SeedLabels(cache), rows, np.ones((4, 2), np.int64))
    mean, spread = feature_statistics(pixels, seed=0)
    assert spread[1] == 0
    assert (spread[[0, 2]] > 0.5).all()
    torch.manual_seed(0)
    net = PixelDecoder({"up0.1": 3}, hidden=8, embedding=4)
    net.standardise(mean, spread)
    tap = torch.from_numpy(cache.read("up0.1", 2).astype(np.float32))[0]
    dense = net.embed_maps({"up0.1": tap.permute(2, 0, 1)[None]}, (4, 4))[0].movedim(0, -1)
    torch.testing.assert_close(dense, net(tap.reshape(-1, 3)).reshape(4, 4, 4), atol=1e-4, rtol=0)


def test_labels_of_masks_are_the_masks_within_the_subject(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    prepared = ShardSet(run.folder / "prepare")
    forget_masks(run.folder / "prepare", prepared.patients["train"][:1])
    table, intact = (
        ShardSet(folder / "prepare").split("train") for folder in (run.folder, debug_run.folder)
    )
    assert 0 < table.has_mask.sum() < len(table)
    labels = MaskLabels(table)
    for row in range(len(table)):
        found, mask = labels.labels(row), intact.read_mask(row)
        assert mask is not None
        assert found.dtype == np.int8
        inside = body_mask(table.read_image(row))
        assert (found[~inside] == -1).all()
        expected = mask[inside] if table.has_mask[row] else -1
        assert (found[inside] == expected).all()
    counts = count_labels(labels, np.arange(len(table)))
    assert not counts[~table.has_mask].any()
    assert counts[table.has_mask].all(axis=1).any()


def test_prototypes_of_many_slices_look_at_some_of_them(
    pixels: TrainingPixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both classes have more slices than are looked at; the seeds per class are as configured."""
    monkeypatch.setattr(training_pixels, "PROTOTYPE_SLICES", 2)
    assert all(len(pixels.slices_with(label)) > 2 for label in (0, 1))
    gathered = []
    gather = training_pixels.gather_pixels

    def remembered(cache: Any, taps: Any, row: int, places: Any, size: Any) -> Any:
        gathered.append((row, len(places)))
        return gather(cache, taps, row, places, size)

    monkeypatch.setattr(training_pixels, "gather_pixels", remembered)
    net = PixelDecoder(
        {tap: training_pixels.num_channels(pixels.cache, tap) for tap in pixels.taps}, 8, 4
    )
    config = load([DEBUG], ["decoder.prototype_pixels=6"])
    prototypes = training_pixels.prototypes_of(config, net, pixels)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(2))
    assert len(gathered) == 4
    assert sum(count for _, count in gathered) <= 12


def test_hard_negatives_train_other_decoders(debug_run: Any, tmp_path: Path) -> None:
    """That of the method and the reference alike."""
    run = debug_run.copy_to(tmp_path, *EARLIER)
    assert main(["train-decoder", *run.words, "decoder.contrast.hard_negatives=0.5"]) == 0
    for row in (".", SUPERVISED):
        name = f"train-decoder/{row}/net.safetensors"
        assert (run.folder / name).read_bytes() != (debug_run.folder / name).read_bytes()


@pytest.mark.parametrize("row", [".", SUPERVISED])
def test_prototypes_are_unit_vectors_one_a_class(debug_run: Any, row: str) -> None:
    net, prototypes = load_decoder(debug_run.folder / "train-decoder" / row)
    assert prototypes.shape == (2, 8)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(2))
    assert not torch.equal(prototypes[0], prototypes[1])
    assert not net.training


def test_the_reference_decoder_differs_from_that_of_the_method(debug_run: Any) -> None:
    folder = debug_run.folder / "train-decoder"
    mine = (folder / "net.safetensors").read_bytes()
    assert mine != (folder / SUPERVISED / "net.safetensors").read_bytes()


def test_a_stop_between_the_two_decoders_costs_only_the_second(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "train-decoder")
    folder = run.folder / "train-decoder"
    (folder / "DONE").unlink()
    shutil.rmtree(folder / SUPERVISED)
    checkpoint = folder / "checkpoints" / "step-00000006" / "task.safetensors"
    before = checkpoint.stat().st_mtime_ns
    assert main(["train-decoder", *run.words]) == 0
    assert "train-decoder: resuming after step 6" in capsys.readouterr().err
    assert checkpoint.stat().st_mtime_ns == before
    for name in ("net.safetensors", "net.json", f"{SUPERVISED}/net.safetensors"):
        assert (folder / name).read_bytes() == (
            debug_run.folder / "train-decoder" / name
        ).read_bytes(), name


def forget_masks(prepared: Path, patients: Sequence[str]) -> int:
    """Take the masks of these patients out of the manifest; the number of slices concerned."""
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    samples = [sample for shard in manifest["shards"] for sample in shard["samples"]]
    forgotten = [sample for sample in samples if sample["patient"] in patients]
    for sample in forgotten:
        sample["mask"] = None
    path.write_text(json.dumps(manifest))
    return len(forgotten)


def test_without_training_masks_there_is_no_reference_row(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    prepared = ShardSet(run.folder / "prepare")
    number = forget_masks(run.folder / "prepare", prepared.patients["train"])
    assert main(["train-decoder", *run.words]) == 0
    assert f"0 of {number} training slices have a mask" in capsys.readouterr().err
    assert not (run.folder / "train-decoder" / SUPERVISED).exists()
    name = "train-decoder/net.safetensors"
    assert (run.folder / name).read_bytes() == (debug_run.folder / name).read_bytes()


def test_a_patient_without_a_mask_leaves_the_reference_row_to_the_others(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER)
    prepared = ShardSet(run.folder / "prepare")
    total = len(prepared.split("train"))
    missing = forget_masks(run.folder / "prepare", prepared.patients["train"][:1])
    assert main(["train-decoder", *run.words]) == 0
    assert (
        f"train-decoder: {total - missing} of {total} training slices have a mask; the reference "
        f"method {SUPERVISED} is trained on those alone"
    ) in capsys.readouterr().err
    done = json.loads((run.folder / "train-decoder" / SUPERVISED / "DONE").read_text())
    table = ShardSet(run.folder / "prepare").split("train")
    masks = [table.read_mask(row) for row in range(total)]
    assert done["slices_with_object_seeds"] == sum(
        mask is not None and mask.any() for mask in masks
    )


def test_triton_kernels_train_the_same_decoder(
    debug_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two optimizer steps, interpreted; the weights are those of the torch path.

    Before the first one a forward alone counts the model's FLOPs.
    """
    pytest.importorskip("triton", reason="triton exists on Linux only")
    from cldf_kernels import triton_passes

    launched = []
    launch = triton_passes.TritonPasses._launch

    def remembered(self: Any, kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(self, kernel, *arguments, **constants)

    monkeypatch.setattr(triton_passes.TritonPasses, "_launch", remembered)
    weights = {}
    for backend in ("torch", "triton"):
        run = debug_run.copy_to(tmp_path / backend, *EARLIER)
        words = [f"decoder.contrast.backend={backend}", "decoder.contrast.precision=fp32"]
        words += ["decoder.fit.steps=2", "evaluate.upper_bound=false"]
        assert main(["train-decoder", *run.words, *words]) == 0
        weights[backend] = {row: net_of(run, row) for row in (".", CLDF_PLUS, PATCH_FEATURES)}
        forward, backward = "lse_forward_symmetric_kernel", "lse_backward_kernel"
        one = [forward, *[forward, backward] * 2]
        assert launched == ([] if backend == "torch" else one * 3)
    for row, of_row in weights["torch"].items():
        moved, start = 0.0, net_of(debug_run, row)
        for name, expected in of_row.items():
            found = weights["triton"][row][name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            moved = max(moved, (expected - start[name]).abs().max().item())
        assert moved > 1e-3, row


def net_of(run: Any, row: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "train-decoder" / row / "net.safetensors")
