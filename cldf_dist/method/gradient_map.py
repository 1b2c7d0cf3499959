"""The gradient map: the gradient of the external classifier's log p(object) on noised slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from cldf_dist.labels import SliceLabel
from cldf_dist.method.noise import Schedule, key_noise


def gradient_map(
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    *,
    timesteps: Sequence[int],
    num_noise_samples: int,
    smooth_pixels: float,
) -> tuple[Float[Tensor, "batch height width"], Float[Tensor, " batch"]]:
    """Maps >= 0 and p(object) of slices.

    A map is the mean over timesteps and noise samples of |grad of log p(object | x_t) with respect
    to x_t|, each gradient scaled to unit length, summed over channels, smoothed by a Gaussian of
    `smooth_pixels`. The probability is the mean over the clean slice (t = 0) and the noise samples
    of the lowest timestep. `classifier(x_t, timesteps)` gives logits and is in evaluation mode.
    """
    lowest = min(timesteps)
    maps = torch.zeros_like(images[:, 0])
    with torch.no_grad():
        probability = _object_probability(classifier(images, _timesteps(images, 0)))
    for timestep in timesteps:
        steps = _timesteps(images, timestep)
        for sample in range(num_noise_samples):
            noise = key_noise(keys, timestep, sample, images.shape[1:], images.device)
            noised = schedule.add_noise(images, steps, noise)
            gradient, logits = _log_odds_gradient(classifier, noised, steps)
            maps += unit_length(gradient).abs().sum(1)
            if timestep == lowest:
                probability = probability + _object_probability(logits)
    return smooth(maps / (len(timesteps) * num_noise_samples), smooth_pixels), probability / (
        1 + num_noise_samples
    )


def unit_length(
    gradients: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """The gradient of each image divided by its L2 norm; 0 stays 0."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=(1, 2, 3), keepdim=True)
    return gradients / norms.clamp_min(torch.finfo(gradients.dtype).tiny)


def smooth(
    maps: Float[Tensor, "batch height width"], pixels: float
) -> Float[Tensor, "batch height width"]:
    """The maps smoothed by a Gaussian with a standard deviation of `pixels`; 0 does nothing.

    The border reflects, so that a constant map stays constant. Raises ValueError where `pixels` is
    negative or the kernel is larger than the map.
    """
    if pixels == 0:
        return maps
    radius = int(3 * pixels + 0.5)
    if pixels < 0 or radius >= min(maps.shape[1:]):
        raise ValueError(
            f"smooth_pixels must be >= 0 and its kernel fit into the map, "
            f"got {pixels} for maps of {tuple(maps.shape[1:])}"
        )
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / pixels) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(maps[:, None], (radius,) * 4, mode="reflect")
    columns = functional.conv2d(padded, kernel[None, None, :, None])
    return functional.conv2d(columns, kernel[None, None, None, :])[:, 0]


def _log_odds_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], noised: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of log p / (1 - p), and the logits.

    It is the gradient of log p times 1 / (1 - p), so of the same direction. After scaling to unit
    length both are equal, but this one does not vanish where p rounds to 1.
    """
    with torch.enable_grad():
        inputs = noised.detach().requires_grad_(True)
        logits = classifier(inputs, timesteps)
        others = torch.cat(
            [logits[:, : SliceLabel.POSITIVE], logits[:, SliceLabel.POSITIVE + 1 :]], 1
        ).logsumexp(1)
        (gradient,) = torch.autograd.grad((logits[:, SliceLabel.POSITIVE] - others).sum(), inputs)
    return gradient, logits.detach()


def _object_probability(logits: Tensor) -> Tensor:
    return logits.float().softmax(1)[:, SliceLabel.POSITIVE]


def _timesteps(images: Tensor, level: int) -> Tensor:
    return torch.full((len(images),), level, device=images.device)
