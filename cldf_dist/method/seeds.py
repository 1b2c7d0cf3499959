"""Seeds: the few pixels whose class the maps can be trusted on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("both", "cam", "gradient")
OBJECT, BACKGROUND, UNKNOWN = 1, 0, -1


def scale_to_unit(maps: Tensor, body_mask: Tensor) -> Tensor:
    """Each map (batch, height, width) scaled to [0, 1] within its subject, 0 outside.

    `body_mask` (batch, height, width) is True on the subject. A map that is constant there
    becomes 0.
    """
    infinity = torch.full_like(maps, math.inf)
    low = torch.where(body_mask, maps, infinity).amin((1, 2), keepdim=True)
    high = torch.where(body_mask, maps, -infinity).amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low)
    return torch.where(body_mask & (high > low), scaled, torch.zeros_like(maps))


def seed_labels(
    gradient_map: Tensor,
    cam: Tensor,
    body_mask: Tensor,
    label: Tensor,
    *,
    rule: str,
    object_threshold: float,
    background_threshold: float,
    negative_slices: bool,
) -> Tensor:
    """Label the pixels we dare to trust: int8 1 object, 0 background, -1 unknown.

    Both maps are (batch, height, width) in [0, 1], `body_mask` is True on the subject, `label`
    (batch,) is the slice's class. In positive slices a pixel is object where the maps that `rule`
    names exceed `object_threshold`, background where they stay under `background_threshold`.
    Negative slices are background throughout the subject, or unknown without `negative_slices`;
    slices of unknown class (label < 0) and pixels outside the subject are unknown. Raises
    ValueError for an unknown rule or unless 0 <= background_threshold <= object_threshold <= 1."""
    if rule not in RULES:
        raise ValueError(f"seeds.rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= background_threshold <= object_threshold <= 1:
        raise ValueError(
            f"seeds need 0 <= background <= foreground <= 1, "
            f"got background {background_threshold} and foreground {object_threshold}"
        )
    maps = {"both": [gradient_map, cam], "cam": [cam], "gradient": [gradient_map]}[rule]
    stacked = torch.stack(maps)
    positive = (label == 1)[:, None, None] & body_mask
    negative = (label == 0)[:, None, None] & body_mask
    seeds = torch.full_like(body_mask, UNKNOWN, dtype=torch.int8)
    seeds[positive & (stacked > object_threshold).all(0)] = OBJECT
    seeds[positive & (stacked < background_threshold).all(0)] = BACKGROUND
    if negative_slices:
        seeds[negative] = BACKGROUND
    return seeds


@dataclass
class SeedCount:
    """Seeds compared with true masks, slice by slice: a diagnostic, never trained on."""

    slices: int = 0
    object_seeds: int = 0
    background_seeds: int = 0
    object_pixels: int = 0
    right_object_seeds: int = 0
    right_background_seeds: int = 0

    def add(self, seeds: Tensor, mask: Tensor) -> None:
        """One slice: seeds and its mask, both (height, width)."""
        inside = mask.bool()
        self.slices += 1
        self.object_seeds += int((seeds == OBJECT).sum())
        self.background_seeds += int((seeds == BACKGROUND).sum())
        self.object_pixels += int(inside.sum())
        self.right_object_seeds += int(((seeds == OBJECT) & inside).sum())
        self.right_background_seeds += int(((seeds == BACKGROUND) & ~inside).sum())

    def quality(self) -> dict[str, float]:
        """Precision is the share of right seeds of a class, recall the share of the object's
        pixels that are object seeds; NaN where there is nothing to divide by."""
        return {
            "object_precision": _share(self.right_object_seeds, self.object_seeds),
            "object_recall": _share(self.right_object_seeds, self.object_pixels),
            "background_precision": _share(self.right_background_seeds, self.background_seeds),
            "object_seeds": self.object_seeds,
            "background_seeds": self.background_seeds,
            "object_pixels": self.object_pixels,
        }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
