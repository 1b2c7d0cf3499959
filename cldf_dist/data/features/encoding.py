"""Features in the form in which the cache keeps them, and rounded as it would round them."""

from __future__ import annotations

import torch
from torch import Tensor

from cldf_dist.data.features.store import SCALE

LARGEST_INT8 = 127
STORAGES = {"float16": torch.float16, "int8": torch.int8}


def to_stored(tap: str, features: Tensor, storage: str) -> dict[str, Tensor]:
    """The arrays of one tap, from (batch, levels, channels, h, w).

    float16: {tap: (batch, levels, h, w, channels)}. int8: the same of whole numbers, and
    {tap + ".scale": float32 (batch, levels, channels)} that they are multiplied by. Raises
    ValueError where a value is not finite or beyond float16.
    """
    pixel_major = features.permute(0, 1, 3, 4, 2)
    if storage == "int8":
        scale = pixel_major.abs().amax((2, 3)) / LARGEST_INT8
        _check_finite(tap, scale, pixel_major)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))[:, :, None, None]
        stored = {tap: (pixel_major / divisor).round().to(torch.int8), tap + SCALE: scale.float()}
    else:
        stored = {tap: pixel_major.half()}
        _check_finite(tap, stored[tap], pixel_major)
    return {name: value.contiguous() for name, value in stored.items()}


def as_stored(features: Tensor, storage: str) -> Tensor:
    """float32 (batch, levels x channels, h, w) of (batch, levels, channels, h, w): the values that
    the cache gives back."""
    stored = to_stored("", features, storage)
    values = stored[""].float()
    if storage == "int8":
        values = values * stored[SCALE][:, :, None, None]
    return values.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _check_finite(tap: str, stored: Tensor, features: Tensor) -> None:
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"features of {tap or 'a tap'} must be finite and within float16 (65504), got up to "
            f"{features.abs().max().item():.3g}; the diffusion model diverged: train it again with "
            "a lower diffusion.fit.learning_rate"
        )
