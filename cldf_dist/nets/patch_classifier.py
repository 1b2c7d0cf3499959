"""The patch classifier: a slice classifier with a limited receptive field."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.config import PatchClassifier as Settings

OUTSIDE = -1.0  # the value of every channel of a prepared slice outside the body


class PatchClassifier(nn.Module):
    """A few 3x3 convolutions with one logit a pixel, pooled to the logit of the slice.

    The logit of a pixel depends on the `2 layers + 1` pixels around it and on nothing else. The
    logit of a slice is the mean of its highest pixels (multiple-instance learning). So the map of
    logits has a limited receptive field, unlike the activation map of a deep net: a pixel is high
    because the pixels around it are. The idea is that of BagNets (Brendel and Bethge, ICLR 2019).
    Nothing else mixes pixels: the norm is over the channels of a pixel, and dropout, a rate that
    the caller applies through `feature_scale`, is of whole channels.
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

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        feature_scale: Float[Tensor, "batch features"] | None = None,
    ) -> Float[Tensor, "batch 2"]:
        """Logits of no object and object; the activations are multiplied by `feature_scale`."""
        features = self.activations(x)
        if feature_scale is not None:
            features = features * feature_scale[:, :, None, None]
        return self.slice_logits(features, x)

    def slice_logits(
        self,
        activations: Float[Tensor, "batch features map_height map_width"],
        x: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch 2"]:
        """Logits of no object and object, from the activations of the slices `x`."""
        inside = (x > OUTSIDE).any(1, keepdim=True).float()
        logit = pooled_logit(
            self.linear(activations)[:, 0].float(),
            functional.max_pool2d(inside, self.downsample)[:, 0] > 0,
            self.pooled_fraction,
        )
        return torch.stack([-logit / 2, logit / 2], 1)

    def activations(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features map_height map_width"]:
        """The activations of the last layer, at 1 / `downsample` of the slices' resolution."""
        activations: Tensor = self.body(functional.avg_pool2d(x, self.downsample))
        return activations

    def patch_logits(
        self,
        activations: Float[Tensor, "batch features map_height map_width"],
        size: tuple[int, int],
    ) -> Float[Tensor, "batch height width"]:
        """The logit of "object" of the window around each pixel, on a grid of `size`.

        Logits are on one scale for all slices.
        """
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


def pooled_logit(
    logits: Float[Tensor, "batch height width"],
    inside: Bool[Tensor, "batch height width"],
    fraction: float,
) -> Float[Tensor, " batch"]:
    """The mean of the highest `fraction` of each map's pixels that are `inside`.

    At least one pixel counts; a map with no pixel inside gives 0.
    """
    count = inside.flatten(1).sum(1)
    kept = (fraction * count).long().clamp(min=1).minimum(count)
    ordered = logits.masked_fill(~inside, -torch.inf).flatten(1).sort(1, descending=True)[0]
    highest = torch.arange(ordered.shape[1], device=logits.device) < kept[:, None]
    mean: Tensor = ordered.where(highest, 0).sum(1) / kept.clamp(min=1)
    return mean
