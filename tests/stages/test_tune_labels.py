"""The tuned label embedding: which of the two is kept, and that later stages take it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cldf_dist.__main__ import main
from cldf_dist.config import load
from cldf_dist.data.shards import ShardSet
from cldf_dist.method.counterfactual import EMBEDDING
from cldf_dist.run import Run
from cldf_dist.stages import tune_labels
from cldf_dist.stages.cache import FrozenNets
from cldf_dist.stages.label_agreement import _spread, saliency_agreement
from cldf_dist.stages.loading import load_diffusion

TRAINED = (
    "prepare", "train-diffusion", "train-classifier", "train-cam", "train-patch-classifier",
)  # fmt: skip


def rows_of(folder: Path) -> torch.Tensor:
    """The embedding that a finished `tune-labels` or `train-diffusion` wrote."""
    tensors = load_file(folder / "net.safetensors")
    return tensors["weight"] if "weight" in tensors else tensors[EMBEDDING]


def agreeing(monkeypatch: pytest.MonkeyPatch, trained: float | None, tuned: float | None) -> None:
    values: Iterator[float | None] = iter((trained, tuned))
    monkeypatch.setattr(tune_labels, "saliency_agreement", lambda *_: next(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "tuned", "kept"),
    [
        (0.4, 0.6, "tuned"), (0.6, 0.4, "trained"), (0.5, 0.5, "trained"), (None, None, "trained"),
    ],
)  # fmt: skip
def test_the_embedding_that_agrees_better_is_kept(
    debug_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: float | None,
    tuned: float | None,
    kept: str,
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare", "train-diffusion")
    agreeing(monkeypatch, trained, tuned)
    assert main(["tune-labels", *run.words]) == 0
    about = json.loads((run.folder / "tune-labels" / "net.json").read_text())
    assert about["kept"] == kept
    assert about["area_auroc"] == {"trained": trained, "tuned": tuned}
    assert f"kept: {kept}" in capsys.readouterr().err
    before = rows_of(run.folder / "train-diffusion")
    after = rows_of(run.folder / "tune-labels")
    changed = (after != before).any(1).tolist()
    assert changed == ([True, True, False] if kept == "tuned" else [False] * 3)


@pytest.mark.slow
def test_later_stages_take_what_was_kept(
    debug_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = debug_run.copy_to(tmp_path, *TRAINED)
    agreeing(monkeypatch, 0.0, 1.0)
    assert main(["tune-labels", *run.words]) == 0
    config = load(run.words[:1], run.words[1:])
    own, tuned = (rows_of(run.folder / stage) for stage in ("train-diffusion", "tune-labels"))
    assert not torch.equal(own, tuned)
    for enabled, expected in ((True, tuned), (False, own)):
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
    assert main(["tune-labels", *run.words, off]) == 0
    assert not (run.folder / "tune-labels" / "net.safetensors").exists()
    assert main(["cache", *run.words, off]) == 0
    assert main(["tune-labels", *run.words]) == 1, "made with other settings"


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


def test_compared_slices_are_of_known_label_and_evenly_spread() -> None:
    labels = np.array([0, -1, 1, 0, -2, 1, 1, 0])
    assert _spread(labels, 100).tolist() == [0, 2, 3, 5, 6, 7]
    assert _spread(labels, 3).tolist() == [0, 3, 7]
    assert _spread(labels, 1).tolist() == [0]
    assert _spread(labels[1:2], 5).tolist() == []
