"""Maps scaled to [0, 1] within the body."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def range_within(maps: Tensor, body_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value, each (batch, 1, 1), of maps (batch, height, width) where
    `body_mask` is True; inf and -inf for a map without a body."""
    infinity = torch.full_like(maps, math.inf)
    low = torch.where(body_mask, maps, infinity).amin((1, 2), keepdim=True)
    high = torch.where(body_mask, maps, -infinity).amax((1, 2), keepdim=True)
    return low, high


def scale_to_unit(maps: Tensor, body_mask: Tensor) -> Tensor:
    """Each map (batch, height, width) scaled to [0, 1] where `body_mask` is True, 0 elsewhere.

    A map that is constant there becomes 0.
    """
    low, high = range_within(maps, body_mask)
    scaled = (maps - low) / (high - low)
    return torch.where(body_mask & (high > low), scaled, torch.zeros_like(maps))
