"""Baselines that ask the diffusion model itself what an object-free slice would look like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cldf_dist.method.gradient_map import smooth
from cldf_dist.method.noise import Schedule, key_noise


@torch.no_grad()
def cdm_saliency(
    net: nn.Module,
    schedule: Schedule,
    images: Tensor,
    keys: Sequence[str],
    *,
    noise_levels: Sequence[int],
    draws: int,
    smooth_pixels: float,
) -> Tensor:
    """Saliency (batch, height, width) >= 0 by condition flip, on one scale for all slices.

    The mean over noise levels and draws of |noise predicted for "object" - noise predicted for
    "no object"| at the same x_t, summed over channels, then smoothed.
    """
    num_images = len(images)
    labels = torch.arange(2, device=images.device).repeat_interleave(num_images)
    total = torch.zeros_like(images[:, 0])
    for level in noise_levels:
        timesteps = torch.full((2 * num_images,), level, device=images.device)
        for draw in range(draws):
            noise = key_noise(keys, level, draw, images.shape[1:], images.device)
            noised = schedule.add_noise(images, timesteps[:num_images], noise).repeat(2, 1, 1, 1)
            output = net(noised, timesteps, class_labels=labels)
            absent, present = schedule.predicted_noise(noised, timesteps, output).chunk(2)
            total += (present - absent).abs().sum(1)
    return smooth(total / (len(noise_levels) * draws), smooth_pixels)
