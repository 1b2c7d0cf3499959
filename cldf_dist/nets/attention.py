"""Self-attention through torch's fused kernel or xformers, inside MONAI's networks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from monai.networks.blocks import SABlock
from torch import Tensor, nn
from torch.nn import functional

BACKENDS = ("sdpa", "xformers")


def use_attention(net: nn.Module, backend: str) -> None:
    """Replace every self-attention of `net` by `SelfAttention`, weights and their names kept.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}")
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SABlock):
                setattr(parent, name, _converted(child, backend))


def check_attention(backend: str, device: torch.device) -> None:
    """Raise ValueError, with the remedy, where `backend` cannot run on `device`."""
    if backend == "xformers":
        _try_xformers(device, torch.float16)


class SelfAttention(SABlock):  # type: ignore[misc]  # MONAI is untyped
    """MONAI's block without its layout shuffles; only `forward` differs, so weights are shared."""

    backend = "sdpa"

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (batch, positions, channels), and so is the result."""
        heads = (self.num_heads, self.dim_head)
        query = self.to_q(x).unflatten(-1, heads)  # (batch, positions, heads, head channels)
        key = self.to_k(x).unflatten(-1, heads)
        value = self.to_v(x).unflatten(-1, heads)
        if self.backend == "xformers":
            _try_xformers(x.device, query.dtype)
            mixed = _xformers().memory_efficient_attention(query, key, value)
        else:
            mixed = functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            ).transpose(1, 2)
        projected: Tensor = self.out_proj(mixed.flatten(-2))
        return projected


def _converted(block: Any, backend: str) -> SelfAttention:
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
    attention.backend = backend
    return attention


def _xformers() -> Any:
    with warnings.catch_warnings():
        # xformers warns where its compiled extension does not match torch; its dispatch to
        # torch's own kernels, all that is used here, does not need the extension.
        warnings.simplefilter("ignore")
        from xformers import ops
    return ops


@cache
def _try_xformers(device: torch.device, dtype: torch.dtype) -> None:
    remedy = 'set attention to "sdpa" (diffusion.net.attention=sdpa); the weights are the same'
    if device.type != "cuda":
        raise ValueError(f"attention=xformers needs a CUDA device, got {device}; {remedy}")
    probe = torch.zeros(1, 16, 2, 32, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            _xformers().memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"attention=xformers failed on {device}, {dtype}; {remedy}") from error
