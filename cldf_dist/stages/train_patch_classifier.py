"""Train the classifier of small windows, whose patch logits make the seeds of `cldf_plus`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import shard_set, training_stream, validation_stream
from cldf_dist.nets.patch_classifier import PatchClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, load_with_package, write_card
from cldf_dist.training.time_estimate import training_time

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
    settings = config.patch_classifier
    if not settings.enabled:
        return {"enabled": False}
    shards = shard_set(config, run)
    num_channels = len(shards.manifest["channels"])
    task = _task(config, num_channels)
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        about = {
            "kind": "patch classifier",
            "net": to_plain(settings),
            "num_channels": num_channels,
        }
        save_net(net, run.folder, about)
        write_card(run, shards, NET_CARD)
    return {"enabled": True, "parameters": sum(p.numel() for p in net.parameters())}


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """What `--dry-run` prints: size of the net, and time."""
    settings = config.patch_classifier
    if not settings.enabled:
        return {"time": "none: patch_classifier.enabled=false"}
    num_channels = len(datasets.channels(config.data))
    task = _task(config, num_channels)
    return training_time(task, settings.fit, num_channels, config.data.image_size)


def _task(config: Config, num_channels: int) -> Classify:
    settings = config.patch_classifier
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return Classify(
        PatchClassifier(settings, num_channels),
        label_smoothing=settings.label_smoothing,
        noise=None,
        seed=config.seed,
    )
