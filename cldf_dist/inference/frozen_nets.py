"""The trained nets of a run, frozen, and the gradient map, for both `cache` and `segment`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cldf_dist.config import Config
from cldf_dist.inference.loading import (
    load_cam,
    load_classifier,
    load_diffusion,
    load_patch_classifier,
    noise_schedule,
    place,
)
from cldf_dist.method.gradient_map import gradient_map
from cldf_dist.method.noise import Schedule
from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier
from cldf_dist.nets.patch_classifier import PatchClassifier
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run


@dataclass(frozen=True)
class FrozenNets:
    """The trained nets that compute features and maps, on this process's device."""

    diffusion: nn.Module
    schedule: Schedule
    classifier: nn.Module
    cam: nn.Module
    patch_classifier: PatchClassifier | None  # where patch_classifier.enabled

    @classmethod
    def load(cls, config: Config, run: Run) -> FrozenNets:
        """The nets of a run; raises FileNotFoundError where a training is not finished."""
        tuned = run.needs("tune-label-embedding") if config.label_tuning.enabled else None
        diffusion, schedule = load_diffusion(run.needs("train-diffusion"), tuned)
        return cls(
            diffusion,
            schedule,
            load_classifier(run.needs("train-classifier")),
            load_cam(run.needs("train-cam")),
            load_patch_classifier(run.needs("train-patch-classifier"))
            if config.patch_classifier.enabled
            else None,
        )

    @classmethod
    def untrained(cls, config: Config, num_channels: int) -> FrozenNets:
        """The same nets with random weights, to measure how long they take."""
        nets = (
            build_unet(config.diffusion.net, num_channels),
            NoisyClassifier(config.classifier, num_channels),
            CamClassifier(config.cam, num_channels),
        )
        diffusion, classifier, cam = (place(net) for net in nets)
        patches: Any = None
        if config.patch_classifier.enabled:
            patches = place(PatchClassifier(config.patch_classifier, num_channels))
        return cls(diffusion, noise_schedule(config), classifier, cam, patches)


def gradient_map_of(
    config: Config,
    nets: FrozenNets,
    images: Float[Tensor, "batch channels height width"],
    keys: list[str],
) -> tuple[Float[Tensor, "batch height width"], Float[Tensor, " batch"]]:
    """Gradient maps and p(object) by the settings `gradient_map`."""
    settings = config.gradient_map
    return gradient_map(
        nets.classifier,
        nets.schedule,
        images,
        keys,
        timesteps=settings.timesteps,
        num_noise_samples=settings.num_noise_samples,
        smooth_pixels=settings.smooth_pixels,
    )
