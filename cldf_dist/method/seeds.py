"""Seeds, the pixels with a confident pseudo-label: the rules of `cldf` and of `cldf_plus`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int, Int8, Shaped
from torch import Tensor

from cldf_dist.config import SeedRule
from cldf_dist.labels import PixelLabel, SliceLabel
from cldf_dist.maths.scaling import range_within

RULES = get_args(SeedRule)


def seed_labels(
    gradient_map: Float[Tensor, "batch height width"],
    cam: Float[Tensor, "batch height width"],
    body_mask: Bool[Tensor, "batch height width"],
    label: Int[Tensor, " batch"],
    *,
    rule: str,
    object_threshold: float,
    background_threshold: float,
    negative_slices: bool,
) -> Int8[Tensor, "batch height width"]:
    """The seeds of `cldf` in a batch of slices, a `PixelLabel` each.

    Both maps are in [0, 1]; `label` is the class of each slice. In positive slices a pixel is
    object where the maps that `rule` names exceed `object_threshold`, and background where they
    are below `background_threshold`. Negative slices are background throughout the body, or unknown
    without `negative_slices`. Slices of unknown class (label < 0) and pixels outside the body are
    unknown. Raises ValueError for an unknown rule or unless
    0 <= background_threshold <= object_threshold <= 1.
    """
    if rule not in RULES:
        raise ValueError(f"seeds.rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= background_threshold <= object_threshold <= 1:
        raise ValueError(
            f"seeds need 0 <= background_threshold <= object_threshold <= 1, "
            f"got background_threshold {background_threshold} and object_threshold "
            f"{object_threshold}"
        )
    maps = {"both": [gradient_map, cam], "cam": [cam], "gradient": [gradient_map]}[rule]
    stacked = torch.stack(maps)
    positive = (label == SliceLabel.POSITIVE)[:, None, None] & body_mask
    negative = (label == SliceLabel.NEGATIVE)[:, None, None] & body_mask
    seeds = torch.full_like(body_mask, PixelLabel.UNKNOWN, dtype=torch.int8)
    seeds[positive & (stacked > object_threshold).all(0)] = PixelLabel.OBJECT
    seeds[positive & (stacked < background_threshold).all(0)] = PixelLabel.BACKGROUND
    if negative_slices:
        seeds[negative] = PixelLabel.BACKGROUND
    return seeds


def patch_seed_labels(
    patch_logits: Float[Tensor, "height width"],
    cam: Float[Tensor, "height width"],
    label: int,
    *,
    object_threshold: float,
    cam_threshold: float,
) -> Int8[Tensor, "height width"]:
    """The seeds of `cldf_plus` in one slice, a `PixelLabel` each.

    `patch_logits` are -inf outside the body, `cam` is an activation map in any scale. In a positive
    slice a pixel is object where its logit exceeds `object_threshold` and the map, scaled to [0, 1]
    within the body, exceeds `cam_threshold` (0: the logit alone decides). Its other pixels are
    unknown. A negative slice is background throughout the body. Pixels outside the body are
    unknown.
    """
    body_mask = torch.isfinite(patch_logits)
    seeds = torch.full_like(patch_logits, PixelLabel.UNKNOWN, dtype=torch.int8)
    if label == SliceLabel.POSITIVE:
        chosen = patch_logits > object_threshold
        if cam_threshold != 0:
            low, high = (part[0] for part in range_within(cam[None], body_mask[None]))
            chosen &= body_mask & (cam - low > cam_threshold * (high - low))
        seeds[chosen] = PixelLabel.OBJECT
    elif label == SliceLabel.NEGATIVE:
        seeds[body_mask] = PixelLabel.BACKGROUND
    return seeds


@dataclass
class SeedCount:
    """Counts of seeds against true masks, slice by slice: a diagnostic, never trained on."""

    slices: int = 0
    object_seeds: int = 0
    background_seeds: int = 0
    object_pixels: int = 0
    right_object_seeds: int = 0
    right_background_seeds: int = 0

    def add(self, seeds: Int[Tensor, "height width"], mask: Shaped[Tensor, "height width"]) -> None:
        """Add the seeds of one slice and its mask, of booleans or 0 and 1."""
        inside = mask.bool()
        self.slices += 1
        self.object_seeds += int((seeds == PixelLabel.OBJECT).sum())
        self.background_seeds += int((seeds == PixelLabel.BACKGROUND).sum())
        self.object_pixels += int(inside.sum())
        self.right_object_seeds += int(((seeds == PixelLabel.OBJECT) & inside).sum())
        self.right_background_seeds += int(((seeds == PixelLabel.BACKGROUND) & ~inside).sum())

    def quality(self) -> dict[str, float]:
        """Precision of the seeds of each class, recall of the object's pixels, and the counts.

        Fractions; NaN where there is nothing to divide by.
        """
        return {
            "object_precision": _fraction(self.right_object_seeds, self.object_seeds),
            "object_recall": _fraction(self.right_object_seeds, self.object_pixels),
            "background_precision": _fraction(self.right_background_seeds, self.background_seeds),
            "object_seeds": self.object_seeds,
            "background_seeds": self.background_seeds,
            "object_pixels": self.object_pixels,
        }


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
