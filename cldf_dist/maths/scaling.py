"""Maps scaled to [0, 1] within the body."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def range_within(
    maps: Float[Tensor, "batch height width"], body_mask: Bool[Tensor, "batch height width"]
) -> tuple[Float[Tensor, "batch 1 1"], Float[Tensor, "batch 1 1"]]:
    """The minimum and maximum of each map within the body; inf and -inf for a map without one."""
    infinity = torch.full_like(maps, math.inf)
    low = torch.where(body_mask, maps, infinity).amin((1, 2), keepdim=True)
    high = torch.where(body_mask, maps, -infinity).amax((1, 2), keepdim=True)
    return low, high


def scale_to_unit(
    maps: Float[Tensor, "batch height width"], body_mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, "batch height width"]:
    """Each map scaled to [0, 1] within the body, and 0 outside it.

    A map that is constant within the body becomes 0.
    """
    low, high = range_within(maps, body_mask)
    scaled = (maps - low) / (high - low)
    return torch.where(body_mask & (high > low), scaled, torch.zeros_like(maps))
