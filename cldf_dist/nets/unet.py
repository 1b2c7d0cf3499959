"""The class-conditional diffusion model's network."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import nn

from cldf_dist.config import UNet
from cldf_dist.labels import UNCONDITIONAL
from cldf_dist.nets.attention import use_attention
from cldf_dist.nets.gradient_checkpointing import use_gradient_checkpointing


def build_unet(
    settings: UNet, num_channels: int, num_classes: int = UNCONDITIONAL + 1
) -> nn.Module:
    """MONAI's class-conditional diffusion U-Net: net(x, timesteps, class_labels=labels).

    `num_classes` counts the "no label given" class. Images are (batch, num_channels, height,
    width), with height and width multiples of 2 ** (levels - 1). Attention is torch's; a training
    with another `settings.attention` replaces it once it knows its device. Raises ValueError where
    the levels do not fit together.
    """
    net: nn.Module = DiffusionModelUNet(**unet_arguments(settings, num_channels, num_classes))
    use_attention(net, "sdpa")
    if settings.gradient_checkpointing:
        use_gradient_checkpointing(net)
    return net


def unet_arguments(
    settings: UNet, num_channels: int, num_classes: int = UNCONDITIONAL + 1
) -> dict[str, Any]:
    """The arguments of MONAI's DiffusionModelUNet as types of JSON.

    With them MONAI alone loads the weights of `build_unet`. Raises ValueError where the levels do
    not fit together.
    """
    check_levels(settings.channels, settings.attention_levels, settings.norm_num_groups)
    # the middle block attends whatever attention_levels says
    attending = (*settings.attention_levels[:-1], True)
    return {
        "spatial_dims": 2,
        "in_channels": num_channels,
        "out_channels": num_channels,
        "num_res_blocks": settings.num_res_blocks,
        "channels": list(settings.channels),
        "attention_levels": list(settings.attention_levels),
        "norm_num_groups": settings.norm_num_groups,
        "num_head_channels": list(
            head_channels(settings.channels, attending, settings.num_head_channels)
        ),
        "num_class_embeds": num_classes,
        "use_flash_attention": True,
    }


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
