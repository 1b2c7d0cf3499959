"""The patch classifier's activations, patch logits and p(object) of slices, from one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.labels import SliceLabel
from cldf_dist.nets.patch_classifier import PatchClassifier

PATCH_TAP = "patch"  # the patch classifier's activations among the features of a pixel
PATCH_LOGITS = "patch_logits"  # in the feature store


@dataclass(frozen=True)
class PatchMaps:
    """The patch classifier's output for a batch of slices."""

    activations: Float[Tensor, "batch 1 features map_height map_width"]  # as those of a tap
    patch_logits: Float[Tensor, "batch height width"]  # -inf outside the body
    probability: Float[Tensor, " batch"]  # of "object"


@torch.no_grad()
def patch_maps(
    net: PatchClassifier,
    images: Float[Tensor, "batch channels height width"],
    body_mask: Bool[Tensor, "batch height width"],
) -> PatchMaps:
    """The maps of slices, computed in one pass without gradients."""
    activations = net.activations(images)
    logits = net.patch_logits(activations, (images.shape[2], images.shape[3]))
    probability = net.slice_logits(activations, images).float().softmax(1)[:, SliceLabel.POSITIVE]
    return PatchMaps(
        activations.float()[:, None], logits.masked_fill(~body_mask, -torch.inf), probability
    )


def plus_taps(config: Config) -> tuple[str, ...]:
    """The taps that `cldf_plus` is trained on."""
    return (*config.features.taps, *([PATCH_TAP] if config.plus.patch_tap else []))
