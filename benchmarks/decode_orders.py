"""The orders in which a slice can be decoded, and the least that any of them must do.

All take the taps of the diffusion model, {tap: (slices, channels, h, w)}, to score maps
(slices, height, width).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from train_setup import meta_net

from cldf_dist.config import Config
from cldf_dist.inference.score_maps import prototype_scores
from cldf_dist.method.features import tap_shapes
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.nets.decoder import PixelDecoder


@dataclass(frozen=True)
class Decoding:
    """A decoder with its prototypes (2, embedding), and made-up taps of some slices."""

    decoder: PixelDecoder
    prototypes: Tensor
    taps: Mapping[str, Tensor]
    side: int  # of a slice, pixels

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def num_slices(self) -> int:
        return len(next(iter(self.taps.values())))

    @property
    def floor_flop(self) -> int:
        """Of one slice: the first layer at the taps' own resolutions, the others at each pixel.

        Upsampling, activations and the comparison with the prototypes are left out.
        """
        hidden, embedding = self.decoder.first.out_features, len(self.prototypes[0])
        first = sum(tap[0].numel() for tap in self.taps.values()) * hidden
        return 2 * (first + self.side**2 * hidden * (hidden + embedding))

    @property
    def floor_bytes(self) -> int:
        """Of one slice: each feature is read once, each score written once."""
        return sum(tap[0].nbytes for tap in self.taps.values()) + 4 * self.side**2


def make_decoding(config: Config, num_slices: int, device: torch.device) -> Decoding:
    """What `segment` would decode with these settings; weights and features are random."""
    torch.manual_seed(0)
    side = config.data.image_size
    shapes = tap_shapes(meta_net(config), side, config.features, config.cam.channels)
    taps = {
        name: torch.randn(num_slices, levels * channels, height, width, device=device)
        for name, (levels, channels, height, width) in shapes.items()
    }
    channels = {name: tap.shape[1] for name, tap in taps.items()}
    decoder = PixelDecoder(channels, config.decoder.hidden, config.decoder.embedding)
    decoder.standardise(torch.randn(decoder.num_features), torch.rand(decoder.num_features) + 0.5)
    prototypes = functional.normalize(torch.randn(2, config.decoder.embedding), dim=1)
    return Decoding(decoder.to(device).eval(), prototypes.to(device), taps, side)


def orders(work: Decoding, tile_pixels: list[int]) -> dict[str, Callable[[], Tensor]]:
    """By name, the naive order first."""
    tiled = {f"ours, tiles of {pixels} pixels": pixels for pixels in tile_pixels}
    return {
        "upsample, concatenate, project": lambda: _naive(work),
        "ours, whole slices": lambda: _whole(work),
        **{name: _tiled(work, pixels) for name, pixels in tiled.items()},
    }


def _naive(work: Decoding) -> Tensor:
    """Standardisation is folded into the first layer, as in ours: it would only cost more."""
    decoder = work.decoder
    features = torch.cat(
        [
            functional.interpolate(
                work.taps[name], size=work.size, mode="bilinear", align_corners=False
            )
            for name in decoder.tap_channels
        ],
        dim=1,
    )
    weight = decoder.first.weight / decoder.std
    bias = decoder.first.bias - weight @ decoder.mean
    hidden = functional.conv2d(features, weight[:, :, None, None], bias)
    embedding = functional.normalize(decoder.rest(hidden.movedim(1, -1)), dim=-1)
    return prototype_score(embedding, work.prototypes)


def _whole(work: Decoding) -> Tensor:
    embedding = work.decoder.embed_maps(work.taps, work.size)
    return prototype_score(embedding.movedim(1, -1), work.prototypes)


def _tiled(work: Decoding, tile_pixels: int) -> Callable[[], Tensor]:
    return lambda: prototype_scores(
        work.decoder, work.prototypes, work.taps, work.size, tile_pixels=tile_pixels
    )
