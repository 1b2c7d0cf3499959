"""The trained nets of a run with their noise schedule, frozen, on this process's device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from cldf_dist import config as settings
from cldf_dist.config import Config, build_section
from cldf_dist.method.noise import Schedule
from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.nets.patch_classifier import PatchClassifier
from cldf_dist.nets.unet import build_unet
from cldf_dist.system.distributed import accelerator
from cldf_dist.system.memory_format import fast_memory_format
from cldf_dist.training.export import load_net, read_description


def noise_schedule(config: Config) -> Schedule:
    """The noise schedule by the settings `diffusion`."""
    diffusion = config.diffusion
    return Schedule(diffusion.num_timesteps, diffusion.schedule, diffusion.prediction)


def load_diffusion(folder: Path, labels: Path | None = None) -> tuple[nn.Module, Schedule]:
    """The frozen CDM on this process's device, and its noise schedule.

    `labels` is a folder of `tune-label-embedding`, whose embedding replaces that of the CDM.
    """
    about = read_description(folder)
    net: Any = build_unet(build_section(settings.UNet, about["net"]), about["num_channels"])
    schedule = Schedule(about["num_timesteps"], about["schedule"], about["prediction"])
    load_net(net, folder)
    if labels:
        net.class_embedding = load_label_embedding(labels)
    return place(net), schedule


def load_label_embedding(folder: Path) -> nn.Embedding:
    """The tuned label embedding of the CDM: vectors for no object, object, and no label given."""
    about = read_description(folder)
    ready: Any = _ready(nn.Embedding(about["num_labels"], about["num_features"]), folder)
    net: nn.Embedding = ready
    return net


def load_classifier(folder: Path) -> nn.Module:
    """The frozen external classifier on this process's device."""
    about = read_description(folder)
    section = build_section(settings.Classifier, about["net"])
    return _ready(NoisyClassifier(section, about["num_channels"]), folder)


def load_cam(folder: Path) -> nn.Module:
    """The frozen clean classifier on this process's device."""
    about = read_description(folder)
    section = build_section(settings.Cam, about["net"])
    return _ready(CamClassifier(section, about["num_channels"]), folder)


def load_patch_classifier(folder: Path) -> PatchClassifier:
    """The frozen patch classifier on this process's device."""
    about = read_description(folder)
    section = build_section(settings.PatchClassifier, about["net"])
    ready: Any = _ready(PatchClassifier(section, about["num_channels"]), folder)
    net: PatchClassifier = ready
    return net


def load_decoder(
    folder: Path,
) -> tuple[PixelDecoder, Float[torch.Tensor, "prototypes embedding"]]:
    """The frozen pixel decoder and its class prototypes, on this process's device."""
    about = read_description(folder)
    net = PixelDecoder(about["tap_channels"], about["hidden"], about["embedding"])
    ready: Any = _ready(net, folder)
    return ready, torch.tensor(about["prototypes"], device=accelerator().device)


def place(net: nn.Module) -> nn.Module:
    """The net, frozen, on this process's device and in the memory format that is fast there."""
    device = accelerator().device
    layout: Any = {"memory_format": fast_memory_format(device)}
    return net.to(device).to(**layout).eval().requires_grad_(False)


def _ready(net: nn.Module, folder: Path) -> nn.Module:
    return place(load_net(net, folder))
