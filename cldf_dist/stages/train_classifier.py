"""Train the external classifier: it tells noised slices with the object from those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.loading import noise_schedule
from cldf_dist.nets.classifiers import NoisyClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify, NoiseRange
from cldf_dist.training.model_card import NetCard, load_with_package
from cldf_dist.training.on_slices import estimate_on_slices, train_on_slices

NET_CARD = NetCard(
    title="Classifier of noised slices",
    does=(
        "`net(x, timesteps)` takes noised slices (batch, channels, height, width) and gives logits "
        "of no object and object. Its gradient to the slice makes CLDF's gradient maps. Inside is "
        "MONAI's `DiffusionModelEncoder` with another head."
    ),
    learnt_from="labels of whole slices: object or not; no mask was read in the training",
    loading=load_with_package("load_classifier"),
    section="classifier",
    tags=("image-classification",),
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Train and save the net; returns what to keep with DONE."""

    def describe(_shards: ShardSet) -> dict[str, Any]:
        return {"kind": "external classifier of noised slices", "net": to_plain(config.classifier)}

    return train_on_slices(config, run, _task, NET_CARD, describe)


def estimate(config: Config, _folder: Path) -> dict[str, str]:
    """The size of the net and the time of its training, as `--dry-run` prints them."""
    return estimate_on_slices(config, _task, "classifier")


def _task(config: Config, num_channels: int) -> Classify:
    settings = config.classifier
    torch.manual_seed(config.seed)  # the same initial weights on every process
    noise = NoiseRange(noise_schedule(config), settings.max_timestep, settings.clean_fraction)
    return Classify(
        NoisyClassifier(settings, num_channels),
        label_smoothing=settings.label_smoothing,
        noise=noise,
        seed=config.seed,
    )
