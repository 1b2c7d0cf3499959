"""Seeds, the pixels with a confident pseudo-label: the rules of `cldf` and of `cldf_plus`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from cldf_dist.config import SeedRule
from cldf_dist.labels import PixelLabel, SliceLabel
from cldf_dist.maths.scaling import range_within

RULES = get_args(SeedRule)


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
    """The seeds of `cldf` in a batch of slices: int8 1 object, 0 background, -1 unknown.

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
    positive = (label == SliceLabel.POSITIVE)[:, None, None] & body_mask
    negative = (label == SliceLabel.NEGATIVE)[:, None, None] & body_mask
    seeds = torch.full_like(body_mask, PixelLabel.UNKNOWN, dtype=torch.int8)
    seeds[positive & (stacked > object_threshold).all(0)] = PixelLabel.OBJECT
    seeds[positive & (stacked < background_threshold).all(0)] = PixelLabel.BACKGROUND
    if negative_slices:
        seeds[negative] = PixelLabel.BACKGROUND
    return seeds


def patch_seed_labels(
    patch_logits: Tensor,
    cam: Tensor,
    label: int,
    *,
    object_threshold: float,
    cam_threshold: float,
) -> Tensor:
    """The seeds of `cldf_plus` in one slice: int8 1 object, 0 background, -1 unknown.

    `patch_logits` (height, width) are -inf outside the body, `cam` (height, width) is an activation
    map in any scale. In a positive slice a pixel is object where its logit exceeds
    `object_threshold` and the map, scaled to [0, 1] within the body, exceeds `cam_threshold` (0:
    the logit alone decides); whatever else is in it is unknown. A negative slice is background
    throughout the body. Pixels outside the body are unknown.
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
        self.object_seeds += int((seeds == PixelLabel.OBJECT).sum())
        self.background_seeds += int((seeds == PixelLabel.BACKGROUND).sum())
        self.object_pixels += int(inside.sum())
        self.right_object_seeds += int(((seeds == PixelLabel.OBJECT) & inside).sum())
        self.right_background_seeds += int(((seeds == PixelLabel.BACKGROUND) & ~inside).sum())

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
