"""The patch classifier: it learns the slice's label, and sees a small window at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.config import PatchClassifier as Settings

OUTSIDE = -1.0  # of every channel, where the subject of a prepared slice is not


class PatchClassifier(nn.Module):
    """A few 3x3 convolutions, whose logit of each pixel depends on `2 layers + 1` pixels around it
    and on nothing else; a slice's logit is the mean of its highest pixels (multiple-instance
    learning).

    So its map of logits has a limited receptive field, unlike the activation map of a deep net: a
    pixel is high because the pixels around it are. The idea is that of BagNets (Brendel and Bethge,
    ICLR 2019). Nothing in it looks across pixels:
    the norm is over the channels of a pixel, and dropout, a rate that the caller applies through
    `feature_scale`, is of whole channels.
    """

    def __init__(self, settings: Settings, num_channels: int) -> None:
        super().__init__()
        self.pooled_fraction = settings.pooled_fraction
        self.downsample = settings.downsample
        self.dropout = settings.dropout
        self.num_features = settings.channels
        widths = [num_channels, *[settings.channels] * settings.layers]
        self.body = nn.Sequential(*(_Layer(*pair) for pair in itertools.pairwise(widths)))
        self.linear = nn.Conv2d(settings.channels, 1, 1)

    def forward(self, x: Tensor, feature_scale: Tensor | None = None) -> Tensor:
        """Logits (batch, 2) of no object and object of slices (batch, channels, height, width);
        activations are multiplied by `feature_scale` (batch, features)."""
        features = self.activations(x)
        if feature_scale is not None:
            features = features * feature_scale[:, :, None, None]
        return self.slice_logits(features, x)

    def slice_logits(self, activations: Tensor, x: Tensor) -> Tensor:
        """Logits (batch, 2) of no object and object, from the activations of slices `x`."""
        inside = (x > OUTSIDE).any(1, keepdim=True).float()
        logit = pooled_logit(
            self.linear(activations)[:, 0].float(),
            functional.max_pool2d(inside, self.downsample)[:, 0] > 0,
            self.pooled_fraction,
        )
        return torch.stack([-logit / 2, logit / 2], 1)

    def activations(self, x: Tensor) -> Tensor:
        """(batch, features, height / downsample, width / downsample): the last activations."""
        activations: Tensor = self.body(functional.avg_pool2d(x, self.downsample))
        return activations

    def patch_logits(self, activations: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (batch, *size) of the pixels: how much the window around each speaks for the
        object. On one scale for all slices."""
        logits = self.linear(activations).float()
        if logits.shape[2:] != size:
            logits = functional.interpolate(logits, size, mode="bilinear")
        found: Tensor = logits[:, 0]
        return found


class _Layer(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
        self.norm = nn.LayerNorm(num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        of_pixels = self.convolution(x).movedim(1, -1)
        activated: Tensor = functional.silu(self.norm(of_pixels))
        return activated.movedim(-1, 1)


def pooled_logit(logits: Tensor, inside: Tensor, share: float) -> Tensor:
    """The mean (batch,) of the highest `share` of each map (batch, height, width), of the pixels
    `inside` and at least one of them; 0 for a map without any."""
    count = inside.flatten(1).sum(1)
    kept = (share * count).long().clamp(min=1).minimum(count)
    ordered = logits.masked_fill(~inside, -torch.inf).flatten(1).sort(1, descending=True)[0]
    highest = torch.arange(ordered.shape[1], device=logits.device) < kept[:, None]
    mean: Tensor = ordered.where(highest, 0).sum(1) / kept.clamp(min=1)
    return mean
