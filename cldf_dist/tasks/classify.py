"""The task that trains a slice classifier, on clean or on noised slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.method.noise import Schedule, sample_dropout, sample_noise, spread_uniform


@dataclass(frozen=True)
class NoiseRange:
    """The noise of the training slices: timesteps below `max_timestep`, or none for a fraction.

    Raises ValueError where a number is out of its range.
    """

    schedule: Schedule
    max_timestep: int  # timestep, exclusive
    clean_fraction: float  # of the samples stays clean, at timestep 0

    def __post_init__(self) -> None:
        if not 0 < self.max_timestep <= self.schedule.num_timesteps:
            raise ValueError(
                f"classifier.max_timestep must be in [1, {self.schedule.num_timesteps}], "
                f"got {self.max_timestep}"
            )
        if not 0 <= self.clean_fraction <= 1:
            raise ValueError(
                f"classifier.clean_fraction must be in [0, 1], got {self.clean_fraction}"
            )


class Classify(nn.Module):
    """Cross-entropy of the slice's class; with `noise` the net also gets the timesteps.

    A batch holds "image" (batch, channels, height, width), "label" (batch,) and "sample_number"
    (batch,). Timestep, noise and dropout of a sample are functions of (seed, sample number).
    """

    def __init__(
        self, net: nn.Module, *, label_smoothing: float, noise: NoiseRange | None, seed: int
    ) -> None:
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing
        self.noise = noise
        self.seed = seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The "loss" and the "accuracy", a fraction."""
        images, numbers = batch["image"], batch["sample_number"]
        labels = batch["label"].to(images.device)
        scale = self._dropout(numbers, images.device)
        if self.noise is None:
            logits = self.net(images, feature_scale=scale).float()
        else:
            noised, timesteps = self._noised(self.noise, images, numbers)
            logits = self.net(noised, timesteps, feature_scale=scale).float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}

    def _noised(
        self, settings: NoiseRange, images: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        timesteps, clean = noising_timesteps(numbers, self.seed, settings)
        timesteps, clean = timesteps.to(images.device), clean.to(images.device)
        noise = sample_noise(images.shape[1:], numbers, self.seed, "noise", images.device)
        noised = settings.schedule.add_noise(images, timesteps, noise)
        return torch.where(clean[:, None, None, None], images, noised), timesteps

    def _dropout(self, numbers: Tensor, device: torch.device) -> Tensor | None:
        rate = float(self.net.dropout)  # type: ignore[arg-type]
        if not self.training or rate == 0:
            return None
        shape = (int(self.net.num_features),)  # type: ignore[arg-type]
        return sample_dropout(shape, numbers, self.seed, rate, device)


def noising_timesteps(
    numbers: Int[Tensor, " batch"], seed: int, settings: NoiseRange
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The timestep of each sample, and whether it stays clean (then its timestep is 0)."""
    position = spread_uniform(numbers, seed, "noise level")
    clean = position < settings.clean_fraction
    spread = (position - settings.clean_fraction) / max(1 - settings.clean_fraction, 1e-9)
    timesteps = (spread * settings.max_timestep).long().clamp(max=settings.max_timestep - 1)
    return timesteps.masked_fill(clean, 0), clean
