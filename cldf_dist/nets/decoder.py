"""The pixel decoder: a pointwise network from diffusion features to a unit-length embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class PixelDecoder(nn.Module):
    """Embeds each pixel from its own features only.

    `tap_channels` names the taps and their channels (noise levels times channels of the tap) in
    the order in which the features of a pixel are concatenated. `dropout` and `noise` are rates
    for the training task, which draws the perturbation per sample and passes it to `forward`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tap_channels: Mapping[str, int],
        hidden: int,
        embedding: int,
        dropout: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.tap_channels = dict(tap_channels)
        self.dropout = dropout
        self.noise = noise
        num_features = sum(self.tap_channels.values())
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.first = nn.Linear(num_features, hidden)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, embedding)
        )

    @property
    def num_features(self) -> int:
        return self.first.in_features

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics (num_features,) of the training features; std 0 counts as 1."""
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"mean and std must have {self.num_features} entries, "
                f"got {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(
        self, features: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """(pixels, num_features) -> unit-length (pixels, embedding).

        `scale` and `shift`, of the features' shape, perturb the standardised features.
        """
        x = (features.float() - self.mean) / self.std
        if scale is not None:
            x = x * scale
        if shift is not None:
            x = x + shift
        return functional.normalize(self.rest(self.first(x)), dim=-1)

    def embed_maps(self, taps: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """Embed whole slices: {tap: (batch, channels, h, w)} -> (batch, embedding, *size).

        Equal to `forward` on the bilinearly upsampled, concatenated taps. The first layer is
        linear and so is upsampling: W concat(up(f_l)) = sum over l of up(W_l f_l), which is
        cheaper, because only `hidden` channels are upsampled.
        """
        weight = self.first.weight / self.std  # standardisation folded in
        hidden: Tensor | None = None
        start = 0
        for name, channels in self.tap_channels.items():
            part = weight[:, start : start + channels, None, None]
            projected = functional.conv2d(taps[name].float(), part)
            upsampled = functional.interpolate(
                projected, size=tuple(size), mode="bilinear", align_corners=False
            )
            hidden = upsampled if hidden is None else hidden + upsampled
            start += channels
        assert hidden is not None, "a decoder has at least one tap"
        bias = self.first.bias - weight @ self.mean
        pixels = (hidden + bias[:, None, None]).movedim(1, -1)
        return functional.normalize(self.rest(pixels), dim=-1).movedim(-1, 1)
