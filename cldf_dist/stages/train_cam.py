"""Train the classifier of clean slices whose activations give the class activation maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import shard_set, training_stream, validation_stream
from cldf_dist.nets.classifiers import CamClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, load_with_package, write_card
from cldf_dist.training.time_estimate import training_time

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
    settings = config.cam
    shards = shard_set(config, run)
    num_channels = len(shards.manifest["channels"])
    task = _task(config, num_channels)
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        about = {
            "kind": "classifier of clean slices",
            "net": to_plain(settings),
            "num_channels": num_channels,
        }
        save_net(net, run.folder, about)
        write_card(run, shards, NET_CARD)
    return {"parameters": sum(p.numel() for p in net.parameters())}


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """What `--dry-run` prints: size of the net, and time."""
    num_channels = len(datasets.channels(config.data))
    task = _task(config, num_channels)
    return training_time(task, config.cam.fit, num_channels, config.data.image_size)


def _task(config: Config, num_channels: int) -> Classify:
    settings = config.cam
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return Classify(
        CamClassifier(settings, num_channels),
        label_smoothing=settings.label_smoothing,
        noise=None,
        seed=config.seed,
    )
