"""`supcon_loss`: the public door, and the differentiable function behind it.

    LSE_i = log Σ_{j ≠ i} exp(s_ij),  s_ij = z_i · z_j / temperature
    L_i   = LSE_i - (z_i · S - z_i · z_i) / (temperature m_i),  S = sum of z over the positive set

With negatives="other" the positives p meet pair by pair:

    L_i = 1/m_i Σ_p softplus(B_i - s_ip),  B_i = log Σ_{n negative} exp(s_in)

A positive set is one class in one group, and m_i the number of positives of i.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cldf_kernels.arguments import (
    FLOAT_TYPES,
    Backend,
    Batch,
    Negatives,
    Precision,
    Reduction,
    check_batch,
    check_settings,
)
from cldf_kernels.backends import choose_backend, without_autocast
from cldf_kernels.definition import naive_supcon
from cldf_kernels.gradients import finite_per_key, scaled_gradient
from cldf_kernels.pair_index import IndexedBatch, PairIndex, index_batch
from cldf_kernels.passes import Passes
from cldf_kernels.ranks import Ranks
from cldf_kernels.torch_passes import TorchPasses


def supcon_loss(
    embeddings: Float[Tensor, "pixels features"],
    labels: Int[Tensor, " pixels"],
    *,
    temperature: float | Float[Tensor, "..."],
    negatives: Negatives = "all",
    weight: Float[Tensor, " pixels"] | None = None,
    group: Int[Tensor, " pixels"] | None = None,
    bank: Float[Tensor, "entries features"] | None = None,
    bank_labels: Int[Tensor, " entries"] | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
    precision: Precision = "auto",
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, ""] | Float[Tensor, " pixels"]:
    """Return the supervised contrastive loss of pixel embeddings (arXiv 2004.11362, Eq. 2).

    An anchor counts if it has a positive, and with negatives="other" a negative too. Where none
    counts, the loss is 0 and the gradient zero. Second derivatives exist only with
    backend="reference".

    Args:
        embeddings: (pixels, features), at most 256 features; L2-normalised for the usual loss.
        labels: (pixels,) classes. A negative label means unknown: the pixel is left out and its
            gradient is exactly zero.
        temperature: divides the dot products, > 0. A tensor of one number is learnt: it gets its
            gradient, and is read by the host once a call.
        negatives: "all" contrasts each positive with every other pixel; "other" with the pixels
            of other classes only (InfoNCE per pair).
        weight: (pixels,) >= 0, multiplies an anchor's loss; "mean" divides by the sum over the
            anchors that count.
        group: (pixels,) ids; only pixels of the same group meet, e.g. one group per image.
        bank: (entries, features) constant further keys that every anchor meets in every group,
            the same on all ranks.
        bank_labels: (entries,) their classes; a negative label leaves an entry out.
        reduction: "mean" over the anchors that count, "sum", or "none".
        process_group: the loss is over the pixels of all ranks of this group; None: of this
            process alone. Every rank must call, also with 0 pixels, and with "none" every rank
            must call backward too. "mean" and "sum" report the same value on all ranks. The
            gradient is multiplied by the number of ranks, so that the average taken by DDP is
            the gradient of the one global loss.
        precision: of the matrix products. "triton" takes all; there "auto" is "fp16" with sums
            in float32, or "fp32" where |z|^2 / temperature exceeds 60 or is tiny. "torch" and
            "reference" take "auto" (the dtype of the embeddings; "torch" computes float16 and
            bfloat16 in float32) or "fp32".
        deterministic: forbid sums in an order that changes between runs, on GPUs at half the
            forward speed; implied by torch.use_deterministic_algorithms(True).
        backend: "triton" needs a GPU of compute capability 8.0 or more, or TRITON_INTERPRET=1 on
            a CPU; "torch" works tile by tile on any device; both take O(N D) memory. "reference"
            is the definition with N x N matrices. "auto" is "triton" for what it can do on a
            GPU, else "torch".

    Returns:
        A scalar, or with reduction="none" one value per pixel; float32, or float64 for float64.
        "reference" keeps the dtype of the embeddings.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument breaks one of these rules.
        RuntimeError: backend="triton" cannot run here.
    """
    check_settings(
        negatives=negatives,
        reduction=reduction,
        precision=precision,
        backend=backend,
        deterministic=deterministic,
        process_group=process_group,
    )
    divisor = _check_temperature(temperature)
    batch = Batch(embeddings, labels, weight, group, bank, bank_labels)
    check_batch(batch)
    chosen = choose_backend(embeddings, backend=backend, precision=precision)
    with without_autocast(embeddings.device.type):
        if chosen == "reference":
            return naive_supcon(
                batch,
                temperature=temperature,
                negatives=negatives,
                reduction=reduction,
                dtype=torch.float32 if precision == "fp32" else embeddings.dtype,
            )
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        indexed = index_batch(
            batch,
            negatives=negatives,
            reduction=reduction,
            process_group=process_group,
            deterministic=deterministic,
        )
        return _differentiable_loss(
            indexed,
            temperature=divisor,
            learnt_temperature=temperature if isinstance(temperature, Tensor) else None,
            reduction=reduction,
            precision=precision,
            deterministic=deterministic,
            backend=chosen,
        )


@dataclass(frozen=True)
class _LossState:
    """State that forward leaves to backward besides tensors of the local anchors."""

    index: PairIndex
    passes: Passes
    ranks: Ranks | None
    temperature: float
    reduction: Reduction
    deterministic: bool


def _differentiable_loss(
    indexed: IndexedBatch,
    *,
    temperature: float,
    learnt_temperature: Tensor | None,
    reduction: Reduction,
    precision: Precision,
    deterministic: bool,
    backend: Literal["triton", "torch"],
) -> Float[Tensor, ""] | Float[Tensor, " pixels"]:
    """Return the loss, attached to the embeddings and to a learnt temperature."""
    passes: Passes
    if backend == "torch":
        passes = TorchPasses(indexed.index, temperature=temperature)
    else:
        # Triton is a heavy import, and absent outside Linux
        from cldf_kernels.triton_passes import TritonPasses

        passes = TritonPasses(
            indexed.index,
            indexed.z.detach(),
            temperature=temperature,
            precision=precision,
            deterministic=deterministic,
        )
    state = _LossState(
        index=indexed.index,
        passes=passes,
        ranks=indexed.ranks,
        temperature=temperature,
        reduction=reduction,
        deterministic=deterministic,
    )
    loss: Tensor = _FUNCTIONS[backend].apply(indexed.z, learnt_temperature, state)
    if reduction == "none" and indexed.positions is not None:
        return loss.new_zeros(indexed.num_pixels).index_copy(0, indexed.positions, loss)
    return loss


class _ExactSupCon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Float[Tensor, "local features"], temperature: Tensor | None, state: _LossState
    ) -> Float[Tensor, ""] | Float[Tensor, " local"]:
        lse, mean_sigmoids, losses = _anchor_losses(z, state)
        ctx.save_for_backward(z, lse, mean_sigmoids)
        ctx.state = state
        ctx.temperature = None if temperature is None else temperature.detach()
        weighted = losses * state.index.anchor_weights[: len(z)]
        if state.reduction == "none":
            return weighted.to(z.dtype)
        total = weighted.sum()
        return (total if state.ranks is None else state.ranks.sum(total)).to(z.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad: Float[Tensor, ""] | Float[Tensor, " local"]
    ) -> tuple[Float[Tensor, "local features"], Float[Tensor, "..."] | None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "supcon_loss: second derivatives (create_graph=True) exist only with "
                'backend="reference"'
            )
        z, lse, mean_sigmoids = ctx.saved_tensors
        state: _LossState = ctx.state
        index, ranks = state.index, state.ranks
        grad = grad.double()
        if state.reduction == "none" and ranks is not None:
            grad = ranks.gather(grad)
        gradient = functools.partial(
            scaled_gradient,
            z,
            index,
            state.passes,
            lse=lse,
            mean_sigmoids=mean_sigmoids,
            upstream=grad * index.anchor_weights,
            deterministic=state.deterministic,
        )
        dz = gradient(bank=True)
        # DDP divides by the world size, but the loss is already that of all ranks
        factor = (1 if ranks is None else ranks.size) / state.temperature
        dtemperature = None
        if ctx.needs_input_grad[1]:
            # a pair of anchors stands in z . dz twice, an anchor and a bank entry once
            slope = (z.double() * dz).sum()
            if index.num_keys > index.num_anchors:
                slope = 2 * slope - (z.double() * gradient(bank=False)).sum()
            slope = slope * (-factor / (2 * state.temperature))
            dtemperature = slope.to(ctx.temperature).reshape(ctx.temperature.shape)
        return dz.mul_(factor), dtemperature, None


class TiledSupCon(_ExactSupCon):
    """By torch, tile by tile; the name is that of the result's grad_fn."""


class TritonSupCon(_ExactSupCon):
    """By Triton kernels; the name is that of the result's grad_fn."""


# Any: torch does not annotate Function.apply
_FUNCTIONS: dict[str, Any] = {"torch": TiledSupCon, "triton": TritonSupCon}


def _anchor_losses(
    z: Float[Tensor, "local features"], state: _LossState
) -> tuple[
    Float64[Tensor, " anchors"], Float64[Tensor, " anchors"] | None, Float64[Tensor, " local"]
]:
    """Return LSE (or B) and the mean sigmoid (None unless negatives="other") of every anchor.

    The third is L_i of the local anchors, 0 where the weight is 0.
    """
    index, passes, ranks = state.index, state.passes, state.ranks
    lse = passes.lse_forward(z)
    lse = lse if ranks is None else ranks.gather(lse)
    num_positives = index.num_positives[: len(z)]
    mean_sigmoids: Tensor | None = None
    if index.negatives == "other":
        losses, sigmoids = passes.softplus_forward(z, finite_per_key(index, lse))
        mean_sigmoids = sigmoids / num_positives
        mean_sigmoids = mean_sigmoids if ranks is None else ranks.gather(mean_sigmoids)
        losses = losses / num_positives
    else:
        positive_sums = index.positive_sums.index_select(0, index.positive_sets[: len(z)])
        attraction = positive_sums.sub_(z).mul_(z).sum(1, dtype=torch.float64)
        scale = -1 / state.temperature
        losses = torch.addcdiv(lse[: len(z)], attraction, num_positives, value=scale)
    return lse, mean_sigmoids, losses.masked_fill(index.anchor_weights[: len(z)] == 0, 0)


def _check_temperature(temperature: float | Tensor) -> float:
    """Return the temperature as a number; raise TypeError or ValueError unless it is above 0."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.dtype not in FLOAT_TYPES:
            raise TypeError(
                "supcon_loss: a temperature tensor must hold one floating point number, got "
                f"{temperature.dtype} of shape {tuple(temperature.shape)}"
            )
        value = float(temperature.detach())
    elif isinstance(temperature, bool) or not isinstance(temperature, (float, int)):
        kind = type(temperature).__name__
        raise TypeError(
            f"supcon_loss: temperature must be a float, or a tensor of one number, got {kind}"
        )
    else:
        value = float(temperature)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"supcon_loss: temperature must be finite and > 0, got {value}; learn its logarithm "
            "where an optimizer moves it: temperature=log_temperature.exp()"
        )
    return value
