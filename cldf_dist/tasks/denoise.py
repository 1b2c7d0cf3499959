"""The task that trains the class-conditional diffusion model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.labels import CLASSES, UNCONDITIONAL
from cldf_dist.method.noise import (
    Schedule,
    sample_dropout,
    sample_noise,
    training_timesteps,
)

PREVIEW_STEPS = 20
PREVIEW_GUIDANCE = (1.0, 3.0)
PREVIEW_SEEDS = 4
PREVIEW_GAP = 2  # pixels, white


class Denoise(nn.Module):
    """The weighted squared error of the prediction at a random timestep.

    A batch holds "image" (batch, channels, height, width), "label" (batch,) and "sample_number"
    (batch,). Timestep, noise and label dropout of a sample are functions of (seed, sample number).
    `image_size` is that of the previews; with 0 there are none.
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

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The "loss"."""
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
    def preview(self, net: nn.Module) -> dict[str, UInt8[np.ndarray, "height width"]]:
        """A grid of the first channel of generated slices, as "samples"; empty without a size.

        A row of the grid has one start noise, the same in each preview. The columns are no object
        and object, each at every guidance scale in its order.
        """
        if not self.image_size:
            return {}
        device = next(net.parameters()).device
        shape = (int(net.in_channels), self.image_size, self.image_size)  # type: ignore[arg-type]
        start = sample_noise(shape, torch.arange(PREVIEW_SEEDS), self.seed, "preview", device)
        noised = start.repeat_interleave(len(CLASSES), 0)
        labels = torch.arange(len(CLASSES), device=device).repeat(PREVIEW_SEEDS)
        samples = [self._sample(net, noised, labels, guidance) for guidance in PREVIEW_GUIDANCE]
        tiles = torch.stack(samples, 1)[:, :, 0]  # (row and class, guidance, height, width)
        return {"samples": _grid(tiles.reshape(PREVIEW_SEEDS, -1, *shape[1:]))}

    def _sample(self, net: nn.Module, noised: Tensor, labels: Tensor, guidance: float) -> Tensor:
        """Slices by DDIM with classifier-free guidance (Ho and Salimans 2021).

        Guidance 1 is the conditional model alone.
        """
        steps = np.linspace(self.schedule.num_timesteps - 1, -1, PREVIEW_STEPS + 1).round()
        free_labels = torch.full_like(labels, UNCONDITIONAL)
        both = torch.cat([labels, free_labels]) if guidance != 1 else labels
        for timestep, following in zip(steps[:-1].astype(int), steps[1:].astype(int)):
            times = torch.full((len(both),), int(timestep), device=noised.device)
            repeated = noised.repeat(len(both) // len(labels), 1, 1, 1)
            output = net(repeated, times, class_labels=both).float()
            if guidance != 1:
                conditional, free = output.chunk(2)
                output = free + guidance * (conditional - free)
            noised = self.schedule.ddim_step(noised, int(timestep), int(following), output)
        return noised


def _grid(tiles: Tensor) -> npt.NDArray[np.uint8]:
    """The tiles (rows, columns, height, width) in [-1, 1] as one image, with gaps between them."""
    padded = functional.pad(tiles, (0, PREVIEW_GAP, 0, PREVIEW_GAP), value=1.0)
    picture = padded.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-PREVIEW_GAP, :-PREVIEW_GAP]
    pixels: npt.NDArray[np.uint8] = ((picture + 1) * 127.5).round().byte().cpu().numpy()
    return pixels
