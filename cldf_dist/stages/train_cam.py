"""Train the classifier of clean slices whose activations give the class activation maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.nets.classifiers import CamClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify
from cldf_dist.training.model_card import NetCard, load_with_package
from cldf_dist.training.on_slices import estimate_on_slices, train_on_slices

NET_CARD = NetCard(
    title="Classifier of clean slices",
    does=(
        "`net(x)` takes slices (batch, channels, height, width) and gives logits of no object and "
        "object. Its activations make CLDF's class activation maps. Inside is MONAI's `ResNet` "
        "with a fine stem and group norm."
    ),
    learnt_from="labels of whole slices: object or not; no mask was read in the training",
    loading=load_with_package("load_cam"),
    section="cam",
    tags=("image-classification",),
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Train and save the net; returns what to keep with DONE."""

    def describe(_shards: ShardSet) -> dict[str, Any]:
        return {"kind": "classifier of clean slices", "net": to_plain(config.cam)}

    return train_on_slices(config, run, _task, NET_CARD, describe)


def estimate(config: Config, _folder: Path) -> dict[str, str]:
    """The size of the net and the time of its training, as `--dry-run` prints them."""
    return estimate_on_slices(config, _task, "cam")


def _task(config: Config, num_channels: int) -> Classify:
    settings = config.cam
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return Classify(
        CamClassifier(settings, num_channels),
        label_smoothing=settings.label_smoothing,
        noise=None,
        seed=config.seed,
    )
