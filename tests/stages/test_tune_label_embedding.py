"""The tuned label embedding: which of the two is kept, and that later stages take it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cldf_dist.__main__ import main
from cldf_dist.config import load
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.loading import load_diffusion
from cldf_dist.inference.saliency_agreement import evenly_spread, saliency_agreement
from cldf_dist.method.counterfactual import EMBEDDING
from cldf_dist.runs.run import Run
from cldf_dist.stages.tune_label_embedding import kept_embedding

TRAINED = (
    "prepare", "train-diffusion", "train-classifier", "train-cam", "train-patch-classifier",
)  # fmt: skip


def slices_of(folder: Path) -> torch.Tensor:
    """The embedding that a finished `tune-label-embedding` or `train-diffusion` wrote."""
    tensors = load_file(folder / "net.safetensors")
    return tensors["weight"] if "weight" in tensors else tensors[EMBEDDING]


@pytest.mark.parametrize(
    ("trained", "tuned", "kept"),
    [
        (0.4, 0.6, "tuned"), (0.6, 0.4, "trained"), (0.5, 0.5, "trained"), (None, None, "trained"),
    ],
)  # fmt: skip
def test_the_embedding_that_agrees_better_is_kept(
    trained: float | None, tuned: float | None, kept: str
) -> None:
    assert kept_embedding({"trained": trained, "tuned": tuned}) == kept


@pytest.mark.slow
def test_the_folder_holds_what_was_kept(debug_run: Any) -> None:
    folder = debug_run.folder / "tune-label-embedding"
    about = json.loads((folder / "net.json").read_text())
    assert about["kept"] == kept_embedding(about["area_auroc"])
    changed = (slices_of(folder) != slices_of(debug_run.folder / "train-diffusion")).any(1).tolist()
    assert changed == ([True, True, False] if about["kept"] == "tuned" else [False] * 3)
    card = (folder / "README.md").read_text()
    assert ("does not hold what this training made" in card) == (about["kept"] == "trained")


@pytest.mark.slow
def test_later_stages_take_the_embedding_of_the_folder(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED, "tune-label-embedding")
    path = run.folder / "tune-label-embedding" / "net.safetensors"
    own = slices_of(run.folder / "train-diffusion")
    save_file({"weight": own + 1}, path)
    config = load(run.words[:1], run.words[1:])
    for enabled, expected in ((True, own + 1), (False, own)):
        tuning = dataclasses.replace(config.label_tuning, enabled=enabled)
        config = dataclasses.replace(config, label_tuning=tuning)
        nets = FrozenNets.load(config, Run(config, "cache", ()))
        weight = nets.diffusion.get_parameter(EMBEDDING)
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)
        assert not weight.requires_grad


@pytest.mark.slow
def test_without_tuning_there_is_no_embedding_and_the_run_goes_on(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED)
    off = "label_tuning.enabled=false"
    assert main(["tune-label-embedding", *run.words, off]) == 0
    assert not (run.folder / "tune-label-embedding" / "net.safetensors").exists()
    assert main(["cache", *run.words, off]) == 0
    assert main(["tune-label-embedding", *run.words]) == 1, "made with other settings"


@pytest.mark.slow
def test_agreement_needs_slices_with_and_without_the_object(debug_run: Any) -> None:
    config = load(debug_run.words[:1], debug_run.words[1:])
    net, schedule = load_diffusion(debug_run.folder / "train-diffusion")
    table = ShardSet(debug_run.folder / "prepare").split("validation")
    found = saliency_agreement(config, table, net, schedule)
    assert found is not None
    assert 0 <= found <= 1
    assert saliency_agreement(config, table, net, schedule) == found
    table.labels[:] = 1
    assert saliency_agreement(config, table, net, schedule) is None


def test_compared_slices_are_evenly_spread() -> None:
    rows = np.array([0, 2, 3, 5, 6, 7])
    assert evenly_spread(rows, 100).tolist() == [0, 2, 3, 5, 6, 7]
    assert evenly_spread(rows, 3).tolist() == [0, 3, 7]
    assert evenly_spread(rows, 1).tolist() == [0]
    assert evenly_spread(rows[:0], 5).tolist() == []
