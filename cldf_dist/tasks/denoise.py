"""Train the class-conditional diffusion model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cldf_dist.config import CLASSES, UNCONDITIONAL
from cldf_dist.method.noise import (
    Schedule,
    sample_dropout,
    sample_noise,
    training_timesteps,
)

PREVIEW_STEPS = 20
PREVIEW_GUIDANCE = (1.0, 3.0)


class Denoise(nn.Module):
    """The weighted squared error of the prediction at a random timestep.

    Timestep, noise and label dropout of a sample are functions of (seed, sample number).
    `image_size` is that of the previews; without it there are none.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        *,
        min_snr_gamma: float,
        label_dropout: float,
        seed: int,
        image_size: int = 0,
    ) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.min_snr_gamma = min_snr_gamma
        self.label_dropout = label_dropout
        self.seed = seed
        self.image_size = image_size

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, numbers = batch["image"], batch["sample_number"]
        device = images.device
        timesteps = training_timesteps(numbers, self.seed, 0, self.schedule.num_timesteps)
        timesteps = timesteps.to(device)
        noise = sample_noise(images.shape[1:], numbers, self.seed, "noise", device)
        kept = sample_dropout((), numbers, self.seed, self.label_dropout, device) > 0
        labels = batch["label"].to(device)
        labels = torch.where(kept & (labels >= 0), labels, UNCONDITIONAL)
        noised = self.schedule.add_noise(images, timesteps, noise)
        output = self.net(noised, timesteps, class_labels=labels).float()
        error = (output - self.schedule.target(images, timesteps, noise)).square().mean((1, 2, 3))
        weight = self.schedule.loss_weight(timesteps, self.min_snr_gamma)
        return {"loss": (weight * error).mean()}

    @torch.no_grad()
    def preview(self, net: nn.Module) -> dict[str, npt.NDArray[np.uint8]]:
        """{"samples": uint8 (height, width * k)}: first channel of classes times guidance."""
        if not self.image_size:
            return {}
        columns = [(c, w) for c in range(len(CLASSES)) for w in PREVIEW_GUIDANCE]
        device = next(net.parameters()).device
        labels = torch.tensor([column[0] for column in columns], device=device)
        guidance = torch.tensor([column[1] for column in columns], device=device)
        shape = (int(net.in_channels), self.image_size, self.image_size)  # type: ignore[arg-type]
        start = sample_noise(shape, torch.zeros(1, dtype=torch.long), self.seed, "preview", device)
        images = self._sample(net, start.expand(len(columns), -1, -1, -1), labels, guidance)
        grid = images[:, 0].permute(1, 0, 2).flatten(1)
        pixels: npt.NDArray[np.uint8] = ((grid + 1) * 127.5).round().byte().cpu().numpy()
        return {"samples": pixels}

    def _sample(self, net: nn.Module, noised: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """DDIM with classifier-free guidance (Ho and Salimans 2021); 1 is the plain class."""
        steps = np.linspace(self.schedule.num_timesteps - 1, -1, PREVIEW_STEPS + 1).round()
        both = torch.cat([labels, torch.full_like(labels, UNCONDITIONAL)])
        for timestep, following in zip(steps[:-1].astype(int), steps[1:].astype(int)):
            times = torch.full((len(both),), int(timestep), device=noised.device)
            output = net(noised.repeat(2, 1, 1, 1), times, class_labels=both).float()
            conditional, free = output.chunk(2)
            guided = free + guidance[:, None, None, None] * (conditional - free)
            noised = self.schedule.ddim_step(noised, int(timestep), int(following), guided)
        return noised
