"""Self-attention through torch's fused kernel or xformers, inside MONAI's networks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from monai.networks.blocks import SABlock
from torch import Tensor, nn
from torch.nn import functional

BACKENDS = ("sdpa", "xformers")


def use_attention(net: nn.Module, backend: str) -> None:
    """Replace every self-attention block of `net` by a `SelfAttention` with the same weights.

    The names of the weights stay. Where a block is a `SelfAttention` already only its backend
    changes, and its parameters are the same objects. Does not check that xformers can run: see
    `xformers_fault`. Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}")
    operator = _xformers().memory_efficient_attention if backend == "xformers" else None
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SABlock):
                attention = child if isinstance(child, SelfAttention) else _converted(child)
                attention.memory_efficient_attention = operator
                setattr(parent, name, attention)


def xformers_fault(net: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why xformers cannot compute the attention of `net`; empty if a trial succeeds.

    `dtype` is that of the attention's inputs: with autocast, autocast's. The trial runs forward
    and backward for the channels per head of each attention block of `net`.
    """
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    blocks: list[Any] = [module for module in net.modules() if isinstance(module, SABlock)]
    for channels in sorted({block.dim_head for block in blocks}):
        fault = _trial_fault(device, dtype, channels)
        if fault:
            return f"fails on {device} for {dtype} and {channels} channels per head: {fault}"
    return ""


class SelfAttention(SABlock):  # type: ignore[misc]  # MONAI is untyped
    """MONAI's block without its layout shuffles; only `forward` differs, so weights are shared.

    `memory_efficient_attention` is that of xformers; without it torch's fused kernel runs.
    """

    memory_efficient_attention: Any = None

    def forward(
        self, x: Float[Tensor, "batch positions channels"]
    ) -> Float[Tensor, "batch positions channels"]:
        """The attended and projected positions."""
        heads = (self.num_heads, self.dim_head)
        query = self.to_q(x).unflatten(-1, heads)  # (batch, positions, heads, head channels)
        key = self.to_k(x).unflatten(-1, heads)
        value = self.to_v(x).unflatten(-1, heads)
        if self.memory_efficient_attention is not None:
            mixed = self.memory_efficient_attention(query, key, value)
        else:
            mixed = functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            ).transpose(1, 2)
        projected: Tensor = self.out_proj(mixed.flatten(-2))
        return projected


def _converted(block: Any) -> SelfAttention:
    plain = (
        not block.use_combined_linear
        and not block.causal
        and block.dropout_rate == 0
        and block.rel_positional_embedding is None
    )
    assert plain, "only the plain attention of the diffusion networks is handled"
    attention = SelfAttention(
        hidden_size=block.inner_dim,
        num_heads=block.num_heads,
        qkv_bias=block.to_q.bias is not None,
        dim_head=block.dim_head,
        hidden_input_size=block.hidden_input_size,
        include_fc=block.include_fc,
        use_combined_linear=False,
        use_flash_attention=True,
    )
    attention.load_state_dict(block.state_dict())
    return attention


def _xformers() -> Any:
    with warnings.catch_warnings():
        # xformers warns where its compiled extension does not match torch; its dispatch to
        # torch's own kernels, all that is used here, does not need the extension.
        warnings.simplefilter("ignore")
        from xformers import ops
    return ops


@cache
def _trial_fault(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    probe = torch.zeros(1, 16, 2, channels, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            _xformers().memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
