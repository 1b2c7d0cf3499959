"""What the patch classifier says about slices, from one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.labels import SliceLabel
from cldf_dist.nets.patch_classifier import PatchClassifier

PATCH_TAP = "patch"  # the patch classifier's activations among the features of a pixel
PATCH_LOGITS = "patch_logits"  # in the feature store


@dataclass(frozen=True)
class PatchMaps:
    """The patch classifier's output for a batch of slices."""

    activations: Tensor  # (batch, 1, features, h, w), as the features of a tap
    patch_logits: Tensor  # (batch, height, width); -inf outside the body
    probability: Tensor  # (batch,) of "object"


@torch.no_grad()
def patch_maps(net: PatchClassifier, images: Tensor, body_mask: Tensor) -> PatchMaps:
    """The maps of slices (batch, channels, height, width); `body_mask` is True on their bodies."""
    activations = net.activations(images)
    logits = net.patch_logits(activations, (images.shape[2], images.shape[3]))
    probability = net.slice_logits(activations, images).float().softmax(1)[:, SliceLabel.POSITIVE]
    return PatchMaps(
        activations.float()[:, None], logits.masked_fill(~body_mask, -torch.inf), probability
    )


def plus_taps(config: Config) -> tuple[str, ...]:
    """The taps that `cldf_plus` learns from."""
    return (*config.features.taps, *([PATCH_TAP] if config.plus.patch_tap else []))
