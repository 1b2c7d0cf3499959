"""Train the external classifier: it tells noised slices with the object from those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.config import Config, to_plain
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import (
    noise_schedule,
    shard_set,
    training_stream,
    validation_stream,
)
from cldf_dist.nets.classifiers import NoisyClassifier
from cldf_dist.runs.run import Run
from cldf_dist.tasks.classify import Classify, NoiseRange
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, load_with_package, write_card
from cldf_dist.training.time_estimate import training_time

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
    settings = config.classifier
    shards = shard_set(config, run)
    num_channels = len(shards.manifest["channels"])
    task = _task(config, num_channels)
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        about = {
            "kind": "external classifier of noised slices",
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
    return training_time(task, config.classifier.fit, num_channels, config.data.image_size)


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
