"""Gradient checkpointing: the activations of a block are recomputed in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def use_gradient_checkpointing(net: nn.Module) -> None:
    """Checkpoint the residual and attention blocks of MONAI's diffusion U-Net, in place.

    Loss and gradients stay what they were, at the cost of about one more forward pass a step.
    Without gradients, and in evaluation mode, nothing is computed twice. Hooks on the blocks
    themselves run once; those on modules inside them run again in the backward pass.
    """
    for module in net.modules():
        recomputed = RECOMPUTED.get(type(module))
        if recomputed is not None:
            module.__class__ = recomputed  # parameters, their names and hooks stay


class RecomputedResnetBlock(DiffusionUNetResnetBlock):  # type: ignore[misc]  # MONAI is untyped
    """MONAI's residual block, of which only the inputs are kept for the backward pass."""

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        emb: Float[Tensor, "batch features"],
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """The output of MONAI's block; `emb` is the embedding of the timestep and label."""
        return _recomputed(self, super().forward, x, emb)


class RecomputedAttentionBlock(SpatialAttentionBlock):  # type: ignore[misc]  # MONAI is untyped
    """MONAI's attention block, of which only the inputs are kept for the backward pass."""

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The output of MONAI's block."""
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
