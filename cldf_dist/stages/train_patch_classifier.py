"""Train the classifier of small windows, whose patch logits make the seeds of `cldf_plus`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.nets.patch_classifier import PatchClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify
from cldf_dist.training.model_card import NetCard, load_with_package
from cldf_dist.training.on_slices import estimate_on_slices, train_on_slices

NET_CARD = NetCard(
    title="Patch classifier",
    does=(
        "`net(x)` takes slices (batch, channels, height, width) and gives logits of no object and "
        "object. `net.patch_logits(net.activations(x), x.shape[2:])` gives the logit of each "
        "pixel, which depends on a small window around it alone."
    ),
    learnt_from="labels of whole slices: object or not; no mask was read in the training",
    loading=load_with_package("load_patch_classifier"),
    section="patch_classifier",
    tags=("image-classification", "multiple-instance-learning"),
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Train and save the net; returns what to keep with DONE."""
    if not config.patch_classifier.enabled:
        return {"enabled": False}

    def describe(_shards: ShardSet) -> dict[str, Any]:
        return {"kind": "patch classifier", "net": to_plain(config.patch_classifier)}

    return {"enabled": True, **train_on_slices(config, run, _task, NET_CARD, describe)}


def estimate(config: Config, _folder: Path) -> dict[str, str]:
    """The size of the net and the time of its training, as `--dry-run` prints them."""
    if not config.patch_classifier.enabled:
        return {"time": "none: patch_classifier.enabled=false"}
    return estimate_on_slices(config, _task, "patch_classifier")


def _task(config: Config, num_channels: int) -> Classify:
    settings = config.patch_classifier
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return Classify(
        PatchClassifier(settings, num_channels),
        label_smoothing=settings.label_smoothing,
        noise=None,
        seed=config.seed,
    )
