"""Train the class-conditional diffusion model on slices with image-level labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cldf_dist.config import Config, to_plain
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import (
    noise_schedule,
    shard_set,
    training_stream,
    validation_stream,
)
from cldf_dist.nets.attention import use_attention, xformers_fault
from cldf_dist.nets.unet import build_unet, unet_arguments
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator, broadcast_object, processes
from cldf_dist.tasks.denoise import Denoise
from cldf_dist.training.engine import autocast_dtype
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import LOAD_WITH_MONAI, NetCard, write_card
from cldf_dist.training.time_estimate import training_time

NET_CARD = NetCard(
    title="Class-conditional diffusion model of slices",
    does=(
        "MONAI's `DiffusionModelUNet`: `net(x, timesteps, class_labels=labels)` takes noised "
        "slices (batch, channels, height, width) and gives the prediction that `net.json` names, "
        "with its noise schedule. Classes: 0 no object, 1 object, 2 no label given. Its decoder's "
        "activations are the features of CLDF."
    ),
    learnt_from="labels of whole slices: object or not; no mask was read in the training",
    loading=LOAD_WITH_MONAI,
    section="diffusion",
    tags=("diffusion",),
    library="monai",
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    settings = config.diffusion
    shards = shard_set(config, run)
    num_channels = len(shards.manifest["channels"])
    task = _task(config, num_channels, config.mixed_precision)
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        about = {
            "kind": "class-conditional diffusion model",
            "net": to_plain(settings.net),
            "monai": unet_arguments(settings.net, num_channels),
            "num_channels": num_channels,
            "channels": shards.manifest["channels"],
            "image_size": config.data.image_size,
            "num_timesteps": settings.num_timesteps,
            "schedule": settings.schedule,
            "prediction": settings.prediction,
        }
        save_net(net, run.folder, about)
        write_card(run, shards, NET_CARD)
    return {"parameters": sum(p.numel() for p in net.parameters())}


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """What `--dry-run` prints: size of the net, and time."""
    num_channels = len(datasets.channels(config.data))
    task = _task(config, num_channels, "no")
    return training_time(task, config.diffusion.fit, num_channels, config.data.image_size)


def _task(config: Config, num_channels: int, mixed_precision: str) -> Denoise:
    settings = config.diffusion
    torch.manual_seed(config.seed)  # the same initial weights on every process
    net = build_unet(settings.net, num_channels)
    _use_wanted_attention(net, settings.net.attention, mixed_precision)
    return Denoise(
        net,
        noise_schedule(config),
        min_snr_gamma=settings.min_snr_gamma,
        label_dropout=settings.label_dropout,
        seed=config.seed,
        image_size=config.data.image_size,
    )


def _use_wanted_attention(net: nn.Module, wanted: str, mixed_precision: str) -> None:
    """Settle it before the first step, alike on all processes; what `auto` means here is said."""
    if wanted == "sdpa":
        return  # as it was built
    device = accelerator().device
    fault = xformers_fault(net, device, autocast_dtype(mixed_precision, device) or torch.float32)
    if wanted == "auto":
        fault_of_main = broadcast_object(fault)
        chosen = f"sdpa: xformers {fault_of_main}" if fault_of_main else "xformers"
        if processes().is_main:
            print(f"diffusion.net.attention=auto is {chosen}", file=sys.stderr)
        if fault_of_main:
            return
    if fault:
        raise ValueError(
            f"attention=xformers {fault}; set attention to sdpa (diffusion.net.attention=sdpa); "
            "the weights are the same"
        )
    use_attention(net, "xformers")
