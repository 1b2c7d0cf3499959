"""The public door: one function, its oracle, and a module that holds the settings."""

import inspect
from typing import TypedDict, Unpack

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
)
from cldf_kernels.reference import naive_supcon
from cldf_kernels.tiled import tiled_supcon


class ReferenceOptions(TypedDict, total=False):
    """What the definition of the loss depends on; see supcon_loss."""

    temperature: float
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
    temperature: float = 0.1,
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
    temperature: divides the dot products.
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
    precision: of the matrix products; "torch" and "reference" take "auto" (the dtype of z; "torch"
        computes float16 and bfloat16 in float32) or "fp32".
    deterministic: forbid sums in an order that changes between runs.
    backend: "torch" and "auto" work tile by tile in O(N D) memory; "reference" is the definition
        with N x N matrices.

    An anchor counts if it has a positive, and with negatives="other" a negative too; where none
    counts, the loss is 0 and the gradient zero. The result is float32, or float64 for float64;
    "reference" keeps the dtype of z. Second derivatives exist only with backend="reference".
    Raises TypeError or ValueError for arguments that break these rules, and RuntimeError for
    backend="triton", which this version does not have.
    """
    check_settings(
        temperature=temperature,
        negatives=negatives,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )
    check_pixels(z, labels, weight, group)
    check_bank(z, bank, bank_labels)
    _check_backend(backend, precision, z, process_group)
    with torch.autocast(z.device.type, enabled=False):
        if backend == "reference":
            return naive_supcon(
                z,
                labels,
                temperature=temperature,
                negatives=negatives,
                weight=weight,
                group=group,
                bank=bank,
                bank_labels=bank_labels,
                reduction=reduction,
            )
        return tiled_supcon(
            z,
            labels,
            temperature=temperature,
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

    def forward(self, z: Tensor, labels: Tensor, **options: Unpack[SupConOptions]) -> Tensor:
        return supcon_loss(z, labels, **(self.options | options))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_backend(
    backend: Backend,
    precision: Precision,
    z: Tensor,
    process_group: dist.ProcessGroup | None,
) -> None:
    if backend == "triton":
        raise RuntimeError(
            'supcon_loss: backend="triton" is not in this version of cldf_kernels; '
            'use backend="auto"'
        )
    if precision not in ("auto", "fp32") or (precision == "fp32" and z.dtype == torch.float64):
        raise ValueError(
            f'supcon_loss: precision="{precision}" does not go with backend="{backend}" and '
            f'{z.dtype}; use precision="auto"'
        )
    if backend == "reference" and process_group is not None:
        raise ValueError(
            'supcon_loss: backend="reference" knows one process only, got a process_group; '
            'use backend="auto"'
        )
