"""The public door: one function, its oracle, and a module that holds the settings."""

import functools
import importlib.util
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cldf_kernels.arguments import (
    Backend,
    Negatives,
    Precision,
    Reduction,
    check_bank,
    check_pixels,
    check_settings,
    check_temperature,
    refuse_weight,
    weight_breaks_rule,
)
from cldf_kernels.exact import MakePasses, exact_supcon
from cldf_kernels.reference import naive_supcon
from cldf_kernels.tiled import TiledPasses


class ReferenceOptions(TypedDict, total=False):
    """What the definition of the loss depends on; see supcon_loss."""

    temperature: float | Tensor
    negatives: Negatives
    weight: Tensor | None
    group: Tensor | None
    bank: Tensor | None
    bank_labels: Tensor | None
    reduction: Reduction


class SupConOptions(ReferenceOptions, total=False):
    """Every keyword argument of supcon_loss."""

    process_group: dist.ProcessGroup | None
    precision: Precision
    deterministic: bool
    backend: Backend


def supcon_loss(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: Negatives = "all",
    weight: Tensor | None = None,
    group: Tensor | None = None,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
    precision: Precision = "auto",
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The supervised contrastive loss (arXiv 2004.11362, "out" form) of pixel embeddings.

    z: (pixels, features), at most 256 features, L2-normalised rows for the usual loss.
    labels: (pixels,) integer classes; a negative label means unknown: the pixel is left out and
        its gradient is exactly zero.
    temperature: divides the dot products. A tensor of one number is learnt: it gets its gradient,
        and is read by the host once a call.
    negatives: "all" contrasts each positive with every other pixel; "other" with the pixels of
        other classes only (InfoNCE per pair).
    weight: (pixels,) >= 0, multiplies an anchor's loss; "mean" divides by the sum over the anchors
        that count.
    group: (pixels,) integers; only pixels of the same group meet, e.g. one group per image.
    bank, bank_labels: (entries, features) and (entries,): constant further keys that every anchor
        meets in every group, the same on all ranks; a negative label leaves an entry out.
    reduction: "mean" over the anchors that count, "sum", or "none": (pixels,) values.
    process_group: the loss over the pixels of all ranks of this group. Every rank must call, also
        with 0 pixels; "mean" and "sum" report the same value on all ranks. The gradient is
        multiplied by the number of ranks, so that the average taken by DDP is the gradient of the
        one global loss. With "none" every rank must call backward too. None: this process alone.
    precision: of the matrix products. "triton" takes all; there "auto" is "fp16" with sums in
        float32, or "fp32" where |z|^2 / temperature exceeds 60 or is tiny. "torch" and "reference"
        take "auto" (the dtype of z; "torch" computes float16 and bfloat16 in float32) or "fp32".
    deterministic: forbid sums in an order that changes between runs, on GPUs at half the forward
        speed; implied by torch.use_deterministic_algorithms(True).
    backend: "triton" needs a GPU of compute capability 8.0 or more, or TRITON_INTERPRET=1 on a CPU;
        "torch" works tile by tile on any device; both take O(N D) memory. "reference" is the
        definition with N x N matrices. "auto" is "triton" for what it can do on a GPU, else
        "torch".

    An anchor counts if it has a positive, and with negatives="other" a negative too; where none
    counts, the loss is 0 and the gradient zero. The result is float32, or float64 for float64;
    "reference" keeps the dtype of z. Second derivatives exist only with backend="reference".
    Raises TypeError or ValueError for arguments that break these rules, and RuntimeError where
    backend="triton" cannot run.
    """
    check_settings(
        negatives=negatives,
        reduction=reduction,
        precision=precision,
        backend=backend,
        deterministic=deterministic,
        process_group=process_group,
    )
    temperature_value = check_temperature(temperature)
    check_pixels(z, labels, weight, group)
    check_bank(z, bank, bank_labels)
    chosen = choose_backend(z, backend=backend, precision=precision)
    if chosen == "reference" and process_group is not None:
        raise ValueError(
            'supcon_loss: backend="reference" knows one process only, got a process_group; '
            'use backend="auto"'
        )
    with _without_autocast(z.device.type):
        if chosen == "reference":
            if weight is not None and bool(weight_breaks_rule(weight).any()):
                refuse_weight(weight)
            return naive_supcon(
                z.float() if precision == "fp32" else z,
                labels,
                temperature=temperature,
                negatives=negatives,
                weight=weight,
                group=group,
                bank=bank,
                bank_labels=bank_labels,
                reduction=reduction,
            )
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        return exact_supcon(
            z,
            labels,
            _make_passes(chosen, precision, deterministic),
            temperature=temperature_value,
            learnable=temperature if isinstance(temperature, Tensor) else None,
            negatives=negatives,
            weight=weight,
            group=group,
            bank=bank,
            bank_labels=bank_labels,
            reduction=reduction,
            process_group=process_group,
            deterministic=deterministic,
        )


def supcon_reference(z: Tensor, labels: Tensor, **options: Unpack[ReferenceOptions]) -> Tensor:
    """The same loss by its definition, N x N and differentiable any number of times.

    Computes in the dtype of `z`; in float64 it is the oracle of the tests. Options and their
    defaults are those of supcon_loss.
    """
    return supcon_loss(z, labels, backend="reference", **options)


class SupConLoss(nn.Module):
    """supcon_loss with its keyword arguments held; those of one call go to `forward`.

    >>> loss = SupConLoss(temperature=0.07)
    >>> loss(z, labels, weight=weight)
    """

    def __init__(self, **options: Unpack[SupConOptions]) -> None:
        super().__init__()
        inspect.signature(supcon_loss).bind(None, None, **options)  # a typo fails here
        self.options = options
        for name, value in list(
            options.items()
        ):  # they move, are saved and trained with the module
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, z: Tensor, labels: Tensor, **options: Unpack[SupConOptions]) -> Tensor:
        held: Any = {name: getattr(self, name, value) for name, value in self.options.items()}
        return supcon_loss(z, labels, **(held | options))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def choose_backend(
    z: Tensor, *, backend: Backend = "auto", precision: Precision = "auto"
) -> Literal["triton", "torch", "reference"]:
    """What supcon_loss takes for embeddings like `z`; raises as it does where that cannot run."""
    chosen = backend
    if chosen == "auto":
        fits = z.is_cuda and z.dtype != torch.float64 and _why_not_compiled(z.device) is None
        chosen = "triton" if fits else "torch"
    if chosen == "triton":
        if z.dtype == torch.float64:
            raise ValueError(
                'supcon_loss: backend="triton" does not take float64; use float32, float16 or '
                'bfloat16, or backend="torch"'
            )
        reason = _why_no_triton(z.device)
        if reason:
            raise RuntimeError(f'supcon_loss: backend="triton" {reason}; use backend="auto"')
    elif chosen == "torch" and precision == "fp32" and z.is_cuda and _tf32_is_allowed():
        raise ValueError(
            'supcon_loss: precision="fp32" with backend="torch" needs '
            "torch.backends.cuda.matmul.allow_tf32 = False, got True"
        )
    elif precision not in ("auto", "fp32") or (precision == "fp32" and z.dtype == torch.float64):
        raise ValueError(
            f'supcon_loss: precision="{precision}" does not go with backend="{backend}" and '
            f'{z.dtype} on {z.device.type}; use precision="auto"'
        )
    return chosen


def _why_no_triton(device: torch.device) -> str | None:
    """None where the kernels run for tensors on this device, compiled or interpreted."""
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
    """None where the kernels are compiled for this device."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type != "cuda":
        return f"needs a GPU, or TRITON_INTERPRET=1 to interpret it, got z on {device.type}"
    if torch.version.hip is not None:
        return "is written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or more, got {major}.{minor}"
    from triton import knobs

    return "is interpreted: TRITON_INTERPRET is set" if knobs.runtime.interpret else None


def _tf32_is_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()  # entering costs the host as much as two operations
    return torch.autocast(device_type, enabled=False)


def _make_passes(chosen: str, precision: Precision, deterministic: bool) -> MakePasses:
    if chosen == "torch":
        return TiledPasses
    # Triton is a heavy import, and absent outside Linux
    from cldf_kernels.triton_passes import TritonPasses

    return functools.partial(TritonPasses, precision=precision, deterministic=deterministic)
