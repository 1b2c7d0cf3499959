"""Agreement of two maps of the same slices, without a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def correlations(maps: Tensor, others: Tensor, inside: Tensor) -> Tensor:
    """Pearson's correlation (batch,) of two maps (batch, height, width) over each subject.

    `inside` (batch, height, width) is True on the subject. 0 where a map is constant there; NaN
    where there is no subject.
    """
    count = inside.sum((1, 2)).double()
    first, second = (_centred(values.double(), inside, count) for values in (maps, others))
    together = (first * second).sum((1, 2))
    spread = (first.square().sum((1, 2)) * second.square().sum((1, 2))).sqrt()
    found = torch.where(spread > 0, together / spread, torch.zeros_like(spread))
    return torch.where(count > 0, found, torch.full_like(found, math.nan))


def _centred(values: Tensor, inside: Tensor, count: Tensor) -> Tensor:
    """Less their mean over the subject; 0 outside."""
    kept = values.masked_fill(~inside, 0.0)
    means = kept.sum((1, 2)) / count
    return (kept - means[:, None, None]).masked_fill(~inside, 0.0)
