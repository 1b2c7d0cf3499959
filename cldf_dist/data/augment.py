"""Augmentation of a training slice, a function of (seed, sample number) alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cldf_dist.config import Augment
from cldf_dist.data.slices import DARKEST, OUTSIDE
from cldf_dist.system.seeding import sample_seed


@dataclass(frozen=True)
class _Draws:
    """The random numbers of one sample: always as many, whatever the settings use of them."""

    flip: bool
    change: float  # uniform in [0, 1), to be compared with the probability
    motion: Tensor  # (4,) uniform in [-1, 1): rotation, scale, shift along x and y
    gain: Tensor  # (channels,) standard normal


def augment(image: Tensor, settings: Augment, seed: int, sample_number: int) -> Tensor:
    """A flipped, moved and brightened copy of `image`, (channels, height, width) in [-1, 1].

    The body stays distinguishable: every channel is -1 outside it and above -1 within.
    """
    draws = _draw(image.shape[0], seed, sample_number)
    if settings.flip and draws.flip:
        image = image.flip(-1)
    if draws.change >= settings.probability:
        return image
    inside = (image > OUTSIDE).any(dim=0, keepdim=True).to(image.dtype)
    brightness = (image - OUTSIDE) * inside
    if settings.rotate_degrees or settings.scale or settings.shift:
        moved = _move(torch.cat([brightness, inside]), draws.motion, settings)
        inside = (moved[-1:] > 0.5).to(image.dtype)
        brightness = moved[:-1] / moved[-1:].clamp(min=0.5)
    gain = (1 + settings.intensity * draws.gain).clamp(min=0).view(-1, 1, 1).to(image.dtype)
    changed = (brightness * gain + OUTSIDE).clamp(float(DARKEST), 1)
    return torch.where(inside > 0, changed, torch.full_like(changed, OUTSIDE))


def _draw(num_channels: int, seed: int, sample_number: int) -> _Draws:
    source = torch.Generator().manual_seed(sample_seed(seed, sample_number, "augment"))
    uniform = torch.rand(6, generator=source, dtype=torch.float64)
    return _Draws(
        flip=bool(uniform[0] < 0.5),
        change=float(uniform[1]),
        motion=2 * uniform[2:] - 1,
        gain=torch.randn(num_channels, generator=source, dtype=torch.float64),
    )


def _move(image: Tensor, motion: Tensor, settings: Augment) -> Tensor:
    """(channels, height, width) rotated about the centre, scaled and shifted, padded with 0."""
    turn, size, right, down = motion.tolist()
    angle = math.radians(settings.rotate_degrees) * turn
    zoom = 1 + settings.scale * size
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    # grid_sample counts from -1 to 1: a fraction of the image size is twice that
    shift_x, shift_y = 2 * settings.shift * right, 2 * settings.shift * down
    matrix = torch.tensor(
        [
            [cosine, sine, -cosine * shift_x - sine * shift_y],
            [-sine, cosine, sine * shift_x - cosine * shift_y],
        ],
        dtype=image.dtype,
    )
    grid = functional.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    return functional.grid_sample(image[None], grid, align_corners=False)[0]
