"""`choose_backend`: what computes the loss on a device, and why Triton's kernels cannot."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cldf_kernels.arguments import Backend, Precision


def choose_backend(
    embeddings: Float[Tensor, "pixels features"], *, backend: Backend, precision: Precision
) -> Literal["triton", "torch", "reference"]:
    """Return the backend that supcon_loss takes for such embeddings.

    Raises:
        ValueError: the backend does not take this dtype or precision.
        RuntimeError: backend="triton" cannot run here.
    """
    chosen = backend
    if chosen == "auto":
        fits = embeddings.is_cuda and embeddings.dtype != torch.float64
        fits = fits and _why_not_compiled(embeddings.device) is None
        chosen = "triton" if fits else "torch"
    if chosen == "triton":
        if embeddings.dtype == torch.float64:
            raise ValueError(
                'supcon_loss: backend="triton" does not take float64; use float32, float16 or '
                'bfloat16, or backend="torch"'
            )
        reason = _why_no_triton(embeddings.device)
        if reason:
            raise RuntimeError(f'supcon_loss: backend="triton" {reason}; use backend="auto"')
    elif chosen == "torch" and precision == "fp32" and embeddings.is_cuda and _tf32_is_allowed():
        raise ValueError(
            'supcon_loss: precision="fp32" with backend="torch" needs '
            "torch.backends.cuda.matmul.allow_tf32 = False, got True"
        )
    elif precision not in ("auto", "fp32") or (
        precision == "fp32" and embeddings.dtype == torch.float64
    ):
        raise ValueError(
            f'supcon_loss: precision="{precision}" does not go with backend="{backend}" and '
            f'{embeddings.dtype} on {embeddings.device.type}; use precision="auto"'
        )
    return chosen


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on this type of device."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()  # entering costs the host as much as two operations
    return torch.autocast(device_type, enabled=False)


def _why_no_triton(device: torch.device) -> str | None:
    """Return None where the kernels run for tensors on this device, compiled or interpreted."""
    reason = _why_not_compiled(device)
    if reason is None or importlib.util.find_spec("triton") is None:
        return reason
    from triton import knobs, language
    from triton.runtime.interpreter import InterpretedFunction

    if not knobs.runtime.interpret:
        return reason
    if not isinstance(language.cdiv, InterpretedFunction):
        return "is interpreted only if TRITON_INTERPRET=1 is set before Python starts"
    return None


def _why_not_compiled(device: torch.device) -> str | None:
    """Return None where the kernels are compiled for this device."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type != "cuda":
        return (
            f"needs a GPU, or TRITON_INTERPRET=1 to interpret it, got embeddings on {device.type}"
        )
    if torch.version.hip is not None:
        return "is written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or more, got {major}.{minor}"
    from triton import knobs

    return "is interpreted: TRITON_INTERPRET is set" if knobs.runtime.interpret else None


def _tf32_is_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)
