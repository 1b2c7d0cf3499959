"""Train the class-conditional diffusion model on slices with image-level labels."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cldf_dist.config import Config, to_plain
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.loading import noise_schedule
from cldf_dist.nets.attention import use_attention, xformers_fault
from cldf_dist.nets.unet import build_unet, unet_arguments
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator, broadcast_object, processes
from cldf_dist.tasks.denoise import Denoise
from cldf_dist.training.engine import autocast_dtype
from cldf_dist.training.model_card import LOAD_WITH_MONAI, NetCard
from cldf_dist.training.on_slices import estimate_on_slices, train_on_slices

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
    """Train and save the net; returns what to keep with DONE."""
    settings = config.diffusion

    def describe(shards: ShardSet) -> dict[str, Any]:
        channels = shards.manifest["channels"]
        return {
            "kind": "class-conditional diffusion model",
            "net": to_plain(settings.net),
            "monai": unet_arguments(settings.net, len(channels)),
            "channels": channels,
            "image_size": config.data.image_size,
            "num_timesteps": settings.num_timesteps,
            "schedule": settings.schedule,
            "prediction": settings.prediction,
        }

    make_task = partial(_task, mixed_precision=config.mixed_precision)
    return train_on_slices(config, run, make_task, NET_CARD, describe)


def estimate(config: Config, _folder: Path) -> dict[str, str]:
    """The size of the net and the time of its training, as `--dry-run` prints them."""
    return estimate_on_slices(config, _task, "diffusion")


def _task(config: Config, num_channels: int, *, mixed_precision: str = "no") -> Denoise:
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
