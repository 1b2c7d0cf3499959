"""Gradient checkpointing: activations of a block are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def use_gradient_checkpointing(net: nn.Module) -> None:
    """Let the residual and attention blocks of MONAI's diffusion U-Net keep their inputs only.

    Loss and gradients stay what they were, for about one more forward pass a step. Without
    gradients, and in evaluation mode, nothing is computed twice. Hooks on the blocks themselves run
    once; those on modules inside them run again in the backward pass.
    """
    for module in net.modules():
        recomputed = RECOMPUTED.get(type(module))
        if recomputed is not None:
            module.__class__ = recomputed  # parameters, their names and hooks stay


class RecomputedResnetBlock(DiffusionUNetResnetBlock):  # type: ignore[misc]  # MONAI is untyped
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return _recomputed(self, super().forward, x, emb)


class RecomputedAttentionBlock(SpatialAttentionBlock):  # type: ignore[misc]  # MONAI is untyped
    def forward(self, x: Tensor) -> Tensor:
        return _recomputed(self, super().forward, x)


RECOMPUTED: dict[type[nn.Module], type[nn.Module]] = {
    DiffusionUNetResnetBlock: RecomputedResnetBlock,
    SpatialAttentionBlock: RecomputedAttentionBlock,
}


def _recomputed(block: nn.Module, forward: Any, *inputs: Tensor) -> Tensor:
    # a frozen net in evaluation mode may be between the loss and what is trained
    trained_before_it = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    if not (block.training or trained_before_it):
        output: Tensor = forward(*inputs)
    else:  # nothing in the blocks is random: there is no generator to set back
        output = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
