"""Train the class-conditional diffusion model on slices with image-level labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cldf_dist.checkpoint import save_net
from cldf_dist.config import Config, to_plain
from cldf_dist.data import datasets
from cldf_dist.fit import fit
from cldf_dist.nets.unet import build_unet
from cldf_dist.run import Run
from cldf_dist.stages.loading import noise_schedule, shard_set, training_stream, validation_stream
from cldf_dist.stages.timing import training_time
from cldf_dist.tasks.denoise import Denoise


def run(config: Config, run: Run) -> dict[str, Any]:
    settings = config.diffusion
    shards = shard_set(config, run)
    num_channels = len(shards.manifest["channels"])
    task = _task(config, num_channels)
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        about = {
            "kind": "class-conditional diffusion model",
            "net": to_plain(settings.net),
            "num_channels": num_channels,
            "channels": shards.manifest["channels"],
            "image_size": config.data.image_size,
            "num_timesteps": settings.num_timesteps,
            "schedule": settings.schedule,
            "prediction": settings.prediction,
        }
        save_net(net, run.folder, about)
    return {"parameters": sum(p.numel() for p in net.parameters())}


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """What `--dry-run` prints: size of the net, and time."""
    num_channels = len(datasets.channels(config.data))
    task = _task(config, num_channels)
    return training_time(task, config.diffusion.fit, num_channels, config.data.image_size)


def _task(config: Config, num_channels: int) -> Denoise:
    settings = config.diffusion
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return Denoise(
        build_unet(settings.net, num_channels),
        noise_schedule(config),
        min_snr_gamma=settings.min_snr_gamma,
        label_dropout=settings.label_dropout,
        seed=config.seed,
        image_size=config.data.image_size,
    )
