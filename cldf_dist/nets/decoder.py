"""The pixel decoder: a pointwise network from diffusion features to a unit-length embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.maths.interpolation import linear_neighbours

Place = tuple[slice, slice, slice]  # slices of the batch, rows, columns


class PixelDecoder(nn.Module):
    """A network that embeds each pixel from the features of that pixel alone.

    `tap_channels` maps each tap to its number of channels (timesteps times channels of the
    activation), in the order in which the features of a pixel are concatenated. `dropout` and
    `noise` are rates for the training task, which draws the perturbation per sample and passes it
    to `forward`.
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
        """Features of a pixel."""
        return self.first.in_features

    @property
    def num_dimensions(self) -> int:
        """Dimensions of the embedding."""
        return len(self.rest[-1].get_parameter("bias"))

    def standardise(
        self, mean: Float[Tensor, " features"], std: Float[Tensor, " features"]
    ) -> None:
        """Set the mean and standard deviation of the training features; std 0 counts as 1.

        Raises ValueError unless both have `num_features` entries.
        """
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"mean and std must have {self.num_features} entries, "
                f"got {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(
        self,
        features: Float[Tensor, "*pixels features"],
        *,
        scale: Float[Tensor, "*pixels features"] | None = None,
        shift: Float[Tensor, "*pixels features"] | None = None,
    ) -> Float[Tensor, "*pixels embedding"]:
        """Unit-length embeddings of pixels.

        The standardised features are multiplied by `scale`, then `shift` is added.
        """
        x = (features.float() - self.mean) / self.std
        if scale is not None:
            x = x * scale
        if shift is not None:
            x = x + shift
        return functional.normalize(self.rest(self.first(x)), dim=-1)

    def embed_maps(
        self,
        taps: Mapping[str, Float[Tensor, "batch _channels _height _width"]],
        size: Sequence[int],
    ) -> Float[Tensor, "batch embedding height width"]:
        """Embeddings of whole slices, on a grid of `size` (height, width).

        Each tap has its own channels and resolution. The result equals `forward` on the bilinearly
        upsampled, concatenated taps. The first layer is linear and so is upsampling:
        W concat(up(f_l)) = sum over l of up(W_l f_l), which is cheaper, because only `hidden`
        channels are upsampled.
        """
        num_pixels = _num_slices(taps) * math.prod(size)
        ((_, embedding),) = self.embed_tiles(taps, size, tile_pixels=num_pixels)
        return embedding.movedim(-1, 1)

    def embed_tiles(
        self,
        taps: Mapping[str, Float[Tensor, "batch _channels _height _width"]],
        size: Sequence[int],
        *,
        tile_pixels: int,
    ) -> Iterator[tuple[Place, Float[Tensor, "_slices _rows _columns embedding"]]]:
        """The embeddings of `embed_maps` tile by tile, each with its place in the batch.

        A tile holds at most `tile_pixels` pixels, of several slices where they are that small. The
        taps are projected at their own resolution, for the slices of a tile at a time; at the
        resolution of `size` nothing larger than a tile exists. Tiles have no seams: the source
        pixels of each one and their weights are those of the whole slice. Raises ValueError unless
        `tile_pixels` >= 1.
        """
        height, width = size
        device = self.first.weight.device
        neighbours = {
            name: [_neighbours(*sizes, device) for sizes in zip(taps[name].shape[2:], size)]
            for name in self.tap_channels
        }
        # in double precision: large means and small spreads cancel
        weight, std, mean = self.first.weight.double(), self.std.double(), self.mean.double()
        bias = (self.first.bias.double() - (weight / std) @ mean).to(self.first.weight.dtype)
        for images, tiles in _tile_plan(_num_slices(taps), height, width, tile_pixels):
            projected = self._project({name: tap[images] for name, tap in taps.items()})
            for tile in tiles:
                hidden = bias.expand(*(part.stop - part.start for part in (images, *tile)), -1)
                hidden = hidden.clone()
                for name, pixels in projected.items():
                    for axis in (0, 1):
                        pixels = _upsample(pixels, neighbours[name][axis], tile[axis], 1 + axis)
                    hidden += pixels
                yield (images, *tile), functional.normalize(self.rest(hidden), dim=-1)

    def _project(self, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first layer's output for each tap, (slices, height, width, hidden), without bias."""
        weight = self.first.weight / self.std  # standardisation folded in
        parts = weight.split_with_sizes(list(self.tap_channels.values()), dim=1)
        return {
            name: functional.conv2d(taps[name].float(), part[:, :, None, None])
            .movedim(1, -1)
            .contiguous()
            for name, part in zip(self.tap_channels, parts)
        }


class _Neighbours(NamedTuple):
    """For each target pixel of one axis: its two source pixels, and the weight of the upper one."""

    lower: Tensor
    upper: Tensor
    weight: Tensor


def _neighbours(source: int, target: int, device: torch.device) -> _Neighbours | None:
    """The neighbours of all target pixels of one axis; None where both sizes are the same."""
    if source == target:
        return None
    found = linear_neighbours(np.arange(target), target=target, source=source)
    return _Neighbours(*(torch.from_numpy(part).to(device) for part in found))


def _upsample(pixels: Tensor, neighbours: _Neighbours | None, place: slice, dim: int) -> Tensor:
    """The target pixels `place` along axis `dim` of (slices, height, width, hidden)."""
    if neighbours is None:
        return pixels.narrow(dim, place.start, place.stop - place.start)
    lower, upper, weight = (part[place] for part in neighbours)
    weight = weight.view([-1 if axis == dim else 1 for axis in range(pixels.dim())])
    # in place, because memory that is new to the process costs more than the arithmetic
    return pixels.index_select(dim, lower).lerp_(pixels.index_select(dim, upper), weight)


def _num_slices(taps: Mapping[str, Tensor]) -> int:
    return len(next(iter(taps.values())))


def _tile_plan(
    num_slices: int, height: int, width: int, tile_pixels: int
) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Runs of slices that are projected together, and the rows and columns of their tiles.

    A tile is of whole rows where `tile_pixels` allows: then no source column is upsampled twice.
    """
    if tile_pixels < 1:
        raise ValueError(f"tile_pixels must be >= 1, got {tile_pixels}")
    slices = max(1, tile_pixels // (height * width))
    rows = min(height, max(1, tile_pixels // width))
    columns = min(width, tile_pixels)
    tiles = [(part, across) for part in _runs(height, rows) for across in _runs(width, columns)]
    for images in _runs(num_slices, slices):
        yield images, tiles


def _runs(total: int, length: int) -> list[slice]:
    """[0, total) in slices of `length`; the last one may be shorter."""
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]
