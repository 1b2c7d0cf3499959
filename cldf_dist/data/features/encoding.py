"""The encoding of features in the cache, and the rounding that it causes."""

from __future__ import annotations

import torch
from torch import Tensor

from cldf_dist.data.features.store import SCALE

LARGEST_INT8 = 127
STORAGES = {"float16": torch.float16, "int8": torch.int8}


def to_stored(tap: str, features: Tensor, storage: str) -> dict[str, Tensor]:
    """The stored arrays of one tap by name, from (batch, levels, channels, height, width).

    The array `tap` is (batch, levels, height, width, channels). With storage "int8" there is also
    `tap + ".scale"`, float32 (batch, levels, channels), by which its integers are multiplied.
    Raises ValueError where a value is not finite or beyond float16.
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
    """The features with the values that the cache would return, float32.

    (batch, levels, channels, height, width) -> (batch, levels x channels, height, width).
    """
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
