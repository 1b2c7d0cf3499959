"""The task that tunes the diffusion model's label embedding to discriminate the labels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cldf_dist.labels import SliceLabel
from cldf_dist.method.counterfactual import EMBEDDING
from cldf_dist.method.noise import Schedule, sample_noise, training_timesteps

FIRST_SCALE = 100.0  # errors with and without the object differ by about a percent
LEAST_ERROR = 1e-4  # of a prediction, for the ratio


class LabelDiscrimination(nn.Module):
    """Cross-entropy of a slice's class, predicted by which label denoises the slice better.

    The logit of "object" is the relative difference of the two squared errors, error("no object")
    - error("object"), times a learnt scale, plus a learnt offset. `net` is the label embedding. All
    else of `diffusion` is frozen, so that the label can change the prediction only where the frozen
    model's activations let it. A batch holds "image", "label" and "sample_number"; timestep and
    noise of a sample are functions of (seed, sample number).
    """

    autocast = False  # it compares errors that are nearly equal

    def __init__(
        self,
        diffusion: nn.Module,
        schedule: Schedule,
        *,
        timestep_range: tuple[int, int],
        seed: int,
    ) -> None:
        super().__init__()
        weight = diffusion.get_parameter(EMBEDDING).detach()
        self.net = nn.Embedding(*weight.shape)
        self.net.load_state_dict({"weight": weight})
        self.log_scale = nn.Parameter(torch.tensor([FIRST_SCALE]).log())
        self.offset = nn.Parameter(torch.zeros(1))
        self._diffusion = _Shared(diffusion)
        self.schedule = schedule
        self.timestep_range = timestep_range
        self.seed = seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The "loss", the "accuracy" (a fraction) and the mean squared "error" under the label."""
        labels = batch["label"].to(batch["image"].device)
        errors = self.errors(batch["image"], batch["sample_number"])
        right = errors.gather(0, labels[None])[0].detach().clamp(min=LEAST_ERROR)
        gain = (errors[SliceLabel.NEGATIVE] - errors[SliceLabel.POSITIVE]) / right
        logits = self.log_scale.exp() * gain + self.offset
        loss = functional.binary_cross_entropy_with_logits(
            logits, (labels == SliceLabel.POSITIVE).float()
        )
        accuracy = ((logits > 0) == (labels == SliceLabel.POSITIVE)).float().mean()
        return {"loss": loss, "accuracy": accuracy, "error": right.mean()}

    def errors(
        self, images: Float[Tensor, "batch channels height width"], numbers: Int[Tensor, " batch"]
    ) -> Float[Tensor, "2 batch"]:
        """Mean squared error of the predicted noise, given "no object" and given "object"."""
        device = images.device
        timesteps = training_timesteps(numbers, self.seed, *self.timestep_range).to(device)
        noise = sample_noise(images.shape[1:], numbers, self.seed, "noise", device)
        noised = self.schedule.add_noise(images, timesteps, noise).repeat(2, 1, 1, 1)
        told = torch.tensor(
            [SliceLabel.NEGATIVE, SliceLabel.POSITIVE], device=device
        ).repeat_interleave(len(images))
        timesteps = timesteps.repeat(2)
        output: Tensor = functional_call(
            self._diffusion.net,
            {EMBEDDING: self.net.weight},
            (noised, timesteps),
            {"class_labels": told},
        )
        found = self.schedule.predicted_noise(noised, timesteps, output.float())
        return (found - noise.repeat(2, 1, 1, 1)).square().mean((1, 2, 3)).view(2, -1)


class _Shared:
    """A holder of a frozen net that its owner neither trains, saves, nor copies with itself."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self
