"""The class-conditional diffusion model's network."""

from __future__ import annotations

from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import nn

from cldf_dist.config import UNCONDITIONAL, UNet
from cldf_dist.nets.attention import use_attention


def build_unet(
    settings: UNet, num_channels: int, num_classes: int = UNCONDITIONAL + 1
) -> nn.Module:
    """MONAI's class-conditional diffusion U-Net: net(x, timesteps, class_labels=labels).

    `num_classes` counts the "no label given" class. Images are (batch, num_channels, height,
    width), height and width multiples of 2 ** (levels - 1).
    """
    check_levels(settings.channels, settings.attention_levels, settings.norm_num_groups)
    net: nn.Module = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=num_channels,
        out_channels=num_channels,
        num_res_blocks=settings.num_res_blocks,
        channels=tuple(settings.channels),
        attention_levels=tuple(settings.attention_levels),
        norm_num_groups=settings.norm_num_groups,
        # the middle block attends whatever attention_levels says
        num_head_channels=head_channels(
            settings.channels, (*settings.attention_levels[:-1], True), settings.num_head_channels
        ),
        num_class_embeds=num_classes,
        use_flash_attention=True,
    )
    use_attention(net, settings.attention)
    return net


def check_levels(
    channels: tuple[int, ...], attention_levels: tuple[bool, ...], norm_num_groups: int
) -> None:
    """Raise ValueError where the levels of a diffusion network do not fit together."""
    if len(channels) != len(attention_levels):
        raise ValueError(
            f"channels and attention_levels must have one entry per level, "
            f"got {len(channels)} and {len(attention_levels)}"
        )
    odd = [width for width in channels if width % norm_num_groups]
    if odd:
        raise ValueError(f"channels must be multiples of norm_num_groups={norm_num_groups}: {odd}")


def head_channels(
    channels: tuple[int, ...], attention_levels: tuple[bool, ...], wanted: int
) -> tuple[int, ...]:
    """Channels per attention head at each level: `wanted`, or all of a level that is narrower.

    Raises ValueError where a wider level with attention is not a multiple of `wanted`.
    """
    attending = [width for width, attends in zip(channels, attention_levels) if attends]
    odd = [width for width in attending if width > wanted and width % wanted]
    if odd:
        raise ValueError(
            f"channels of attention levels must be multiples of num_head_channels={wanted}: {odd}"
        )
    return tuple(min(width, wanted) for width in channels)
