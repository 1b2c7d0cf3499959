"""The loss and its exact gradient without an N x N matrix, on one rank or many.

    LSE_i = log sum_{j != i} exp(s_ij),  s_ij = z_i . z_j / temperature
    L_i   = LSE_i - (z_i . S - z_i . z_i) / (temperature m_i),  S = sum of z over the cell of i

and with u_i = d loss / d L_i and G the sum of u_j z_j over the cell of i

    temperature dz_i = sum_{j != i} (u_i exp(s_ij - LSE_i) + u_j exp(s_ij - LSE_j)) z_j
                       - (u_i S + G - 2 u_i z_i) / m_i

so that labels enter only O(N D) work. With negatives="other" the positives meet pair by pair:

    L_i = 1/m_i sum_p softplus(B_i - s_ip),  B_i = log sum_{n negative} exp(s_in)

The N x N work is left to `Passes`: tile by tile in torch, or Triton kernels.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.gather import Ranks
from cldf_kernels.pairs import Bank, Pairs, Pixels, pair_up, sum_rows
from cldf_kernels.survey import survey
from cldf_kernels.tile_passes import NEVER


class Passes(Protocol):
    """The N x N work. Values of anchors and keys are float64 and stand in the order of `Pairs`."""

    name: str

    def log_sum_exp(self, z: Tensor) -> Tensor:
        """log sum_j exp(s_ij) of each own anchor over the keys that it meets (negatives="other":
        those of other classes), `NEVER` if there is none."""

    def softmax_keys(self, z: Tensor, lse: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        """sum_j (u_i exp(s_ij - lse_i) + u_j exp(s_ij - lse_j)) k_j of each own anchor over the
        same keys, with or without the bank."""

    def positive_terms(self, z: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """sum_p softplus(b_i - s_ip) and sum_p sigmoid(b_i - s_ip) of each own anchor."""

    def sigmoid_keys(self, z: Tensor, bound: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        """sum_p (u_i sigmoid(b_i - s_ip) + u_p sigmoid(b_p - s_ip)) k_p of each own anchor."""


class MakePasses(Protocol):
    def __call__(self, z: Tensor, pairs: Pairs, temperature: float) -> Passes: ...


@dataclass(frozen=True)
class Settings:
    temperature: float
    negatives: Negatives
    reduction: Reduction
    deterministic: bool


@dataclass(frozen=True)
class _Work:
    """What forward leaves to backward besides tensors of this anchor's own."""

    pairs: Pairs
    passes: Passes
    ranks: Ranks | None
    settings: Settings


def exact_supcon(
    z: Tensor,
    labels: Tensor,
    make_passes: MakePasses,
    *,
    temperature: float,
    learnable: Tensor | None,
    negatives: Negatives,
    weight: Tensor | None,
    group: Tensor | None,
    bank: Tensor | None,
    bank_labels: Tensor | None,
    reduction: Reduction,
    process_group: dist.ProcessGroup | None,
    deterministic: bool,
) -> Tensor:
    """The loss in float32, or float64 for a float64 `z`, with O(N D) extra memory.

    `learnable`: the tensor that holds the temperature and gets its gradient.
    """
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    facts, ranks = survey(z.detach(), labels, weight, process_group)
    kept, kept_z = None, z
    if facts.num_unknown:
        kept = torch.nonzero_static(labels >= 0, size=len(z) - facts.num_unknown).squeeze(1)
        kept_z = z.index_select(0, kept)
    if weight is None and facts.weighted:
        weight = torch.ones_like(labels, dtype=torch.float64)
    pixels = Pixels(
        z=kept_z.detach(),
        labels=_rows(labels, kept).to(torch.int64, copy=True),  # backward reads them too
        groups=None if group is None else _rows(group, kept).long(),
        weights=None if weight is None else _rows(weight, kept).double(),
    )
    constants = None
    if bank is not None and bank_labels is not None:
        listed = bank_labels >= 0
        constants = Bank(bank[listed].to(z.dtype), bank_labels[listed].long())
    settings = Settings(temperature, negatives, reduction, deterministic)
    pairs = pair_up(
        pixels,
        constants,
        ranks,
        facts,
        negatives=negatives,
        reduction=reduction,
        deterministic=deterministic,
    )
    passes = make_passes(pixels.z, pairs, settings.temperature)
    loss: Tensor = FUNCTIONS[passes.name].apply(
        kept_z, learnable, _Work(pairs, passes, ranks, settings)
    )
    if reduction == "none" and kept is not None:
        return z.new_zeros(len(z)).index_copy(0, kept, loss)
    return loss


class _ExactSupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: Tensor | None, work: _Work) -> Tensor:
        lse, pulls, losses = _forward_passes(z, work)
        ctx.save_for_backward(z, lse, pulls)
        ctx.work = work
        ctx.temperature = None if temperature is None else temperature.detach()
        own = losses * work.pairs.shares[: len(z)]
        if work.settings.reduction == "none":
            return own.to(z.dtype)
        total = own.sum()
        return (total if work.ranks is None else work.ranks.sum(total)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "supcon_loss: second derivatives (create_graph=True) exist only with "
                'backend="reference"'
            )
        z, lse, pulls = ctx.saved_tensors
        work: _Work = ctx.work
        pairs, ranks = work.pairs, work.ranks
        grad = grad.double()
        if work.settings.reduction == "none" and ranks is not None:
            grad = torch.cat([grad, ranks.rows_of_others(grad)])
        upstream = grad * pairs.shares
        gradient = _grad_against_all if pairs.negatives == "all" else _grad_against_other_classes
        dz = gradient(z, work, lse, upstream, pulls, bank=True)
        # DDP divides by the world size, but the loss is already that of all ranks
        factor = (1 if ranks is None else ranks.size) / work.settings.temperature
        dtemperature = None
        if ctx.needs_input_grad[1]:
            # a pair of anchors stands in z . dz twice, an anchor and a bank entry once
            slope = (z.double() * dz).sum()
            if pairs.num_keys > pairs.num_anchors:
                among_anchors = gradient(z, work, lse, upstream, pulls, bank=False)
                slope = 2 * slope - (z.double() * among_anchors).sum()
            slope = slope * (-factor / (2 * work.settings.temperature))
            dtemperature = slope.to(ctx.temperature).reshape(ctx.temperature.shape)
        return dz.mul_(factor), dtemperature, None


class TiledSupCon(_ExactSupCon):
    """By torch, tile by tile; the name is that of the result's grad_fn."""


class TritonSupCon(_ExactSupCon):
    """By Triton kernels; the name is that of the result's grad_fn."""


FUNCTIONS: dict[str, Any] = {"torch": TiledSupCon, "triton": TritonSupCon}


def _forward_passes(z: Tensor, work: _Work) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of every anchor: LSE (or B) and mean sigmoid pull (None unless negatives="other").
    Of the own anchors: L_i, 0 where the share is 0. All float64."""
    pairs, passes, ranks = work.pairs, work.passes, work.ranks
    lse = _of_every_anchor(passes.log_sum_exp(z), ranks)
    num_positives = pairs.num_positives[: len(z)]
    pulls: Tensor | None = None
    if pairs.negatives == "other":
        losses, pulls = passes.positive_terms(z, _finite_per_key(pairs, lse))
        pulls = _of_every_anchor(pulls / num_positives, ranks)
        losses = losses / num_positives
    else:
        positive_sums = pairs.cell_sums.index_select(0, pairs.cells[: len(z)])
        attraction = positive_sums.sub_(z).mul_(z).sum(1, dtype=torch.float64)
        scale = -1 / work.settings.temperature
        losses = torch.addcdiv(lse[: len(z)], attraction, num_positives, value=scale)
    return lse, pulls, losses.masked_fill(pairs.shares[: len(z)] == 0, 0)


def _grad_against_all(
    z: Tensor, work: _Work, lse: Tensor, upstream: Tensor, _pulls: Tensor | None, *, bank: bool
) -> Tensor:
    """temperature * dz for negatives="all"."""
    pairs, num_own = work.pairs, len(z)
    dz = _repulsion(z, work, lse, upstream, bank=bank)
    cells, coefficients = pairs.cells[:num_own], upstream[:num_own]
    coefficients = (coefficients / pairs.num_positives[:num_own]).to(z.dtype)[:, None]
    if pairs.uniform and pairs.num_keys == pairs.num_anchors:  # G = u_i S
        pull = pairs.cell_sums.index_select(0, cells).sub_(z)
        return dz.addcmul_(pull, coefficients, value=-2)
    sum_cells = functools.partial(
        sum_rows,
        pairs.keys(z)[: pairs.num_anchors],
        pairs.cells,
        len(pairs.cell_sums),
        deterministic=work.settings.deterministic,
    )
    sums = pairs.cell_sums if bank else sum_cells()  # S
    pull = sums.index_select(0, cells).sub_(z, alpha=2)
    dz.addcmul_(pull, coefficients, value=-1)
    weighted_sums = sum_cells(weights=upstream).index_select(0, cells)  # G
    return dz.sub_(weighted_sums.div_(pairs.num_positives[:num_own, None]))


def _grad_against_other_classes(
    z: Tensor, work: _Work, lse: Tensor, upstream: Tensor, pulls: Tensor, *, bank: bool
) -> Tensor:
    """temperature * dz for negatives="other"."""
    pairs = work.pairs
    dz = _repulsion(z, work, lse, upstream * pulls, bank=bank)
    upstream = pairs.per_key(upstream / pairs.num_positives, of_bank=0)
    return dz.sub_(work.passes.sigmoid_keys(z, _finite_per_key(pairs, lse), upstream, bank=bank))


def _repulsion(z: Tensor, work: _Work, lse: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
    pairs = work.pairs
    return work.passes.softmax_keys(
        z, pairs.per_key(lse, of_bank=NEVER), pairs.per_key(upstream, of_bank=0), bank=bank
    )


def _finite_per_key(pairs: Pairs, lse: Tensor) -> Tensor:
    """B of every key; any finite number for one that has no negative, its share is 0."""
    return pairs.per_key(lse.masked_fill(lse == NEVER, 0), of_bank=0)


def _rows(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values.index_select(0, kept)


def _of_every_anchor(own: Tensor, ranks: Ranks | None) -> Tensor:
    return own if ranks is None else torch.cat([own, ranks.rows_of_others(own)])
