"""The loss and its exact gradient without an N x N matrix, in plain torch, on one rank or many.

    LSE_i = log sum_{j != i} exp(s_ij),  s_ij = z_i . z_j / temperature
    L_i   = LSE_i - (z_i . S - z_i . z_i) / (temperature m_i),  S = sum of z over the cell of i

and with u_i = d loss / d L_i and G the sum of u_j z_j over the cell of i

    temperature dz_i = sum_{j != i} (u_i exp(s_ij - LSE_i) + u_j exp(s_ij - LSE_j)) z_j
                       - (u_i S + G - 2 u_i z_i) / m_i

so that labels enter only O(N D) work. With negatives="other" the positives meet pair by pair:

    L_i = 1/m_i sum_p softplus(B_i - s_ip),  B_i = log sum_{n negative} exp(s_in)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.gather import Ranks, meet_ranks
from cldf_kernels.pairs import Bank, Pairs, Pixels, pair_up, sum_rows
from cldf_kernels.tile_passes import (
    NEVER,
    log_sum_exp,
    positive_terms,
    sigmoid_weighted_keys,
    softmax_weighted_keys,
)


@dataclass(frozen=True)
class _Settings:
    temperature: float
    negatives: Negatives
    reduction: Reduction
    deterministic: bool


def tiled_supcon(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    negatives: Negatives,
    weight: Tensor | None,
    group: Tensor | None,
    bank: Tensor | None,
    bank_labels: Tensor | None,
    reduction: Reduction,
    process_group: dist.ProcessGroup | None,
    deterministic: bool,
) -> Tensor:
    """The loss in float32, or float64 for a float64 `z`, with O(N D) extra memory."""
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    kept = (labels >= 0).nonzero().squeeze(1)
    kept_z = z.index_select(0, kept)
    pixels = Pixels(
        z=kept_z.detach(),
        labels=labels[kept].long(),
        groups=torch.zeros_like(kept) if group is None else group[kept].long(),
        weights=torch.ones_like(kept, dtype=torch.float64)
        if weight is None
        else weight[kept].double(),
    )
    constants = Bank(z[:0].detach(), labels[:0].long())
    if bank is not None and bank_labels is not None:
        listed = bank_labels >= 0
        constants = Bank(bank[listed].to(z.dtype), bank_labels[listed].long())
    ranks = None if process_group is None else meet_ranks(process_group, len(kept), z.device)
    settings = _Settings(float(temperature), negatives, reduction, deterministic)
    pairs = pair_up(
        pixels,
        constants,
        ranks,
        negatives=negatives,
        reduction=reduction,
        deterministic=deterministic,
    )
    loss: Tensor = _TiledSupCon.apply(kept_z, pairs, ranks, settings)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return z.new_zeros(len(z)).index_copy(0, kept, loss)
    return loss


class _TiledSupCon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, pairs: Pairs, ranks: Ranks | None, settings: _Settings
    ) -> Tensor:
        lse, pulls, losses = _forward_passes(z, pairs, ranks, settings)
        ctx.save_for_backward(z, lse, pulls)
        ctx.pairs, ctx.ranks, ctx.settings = pairs, ranks, settings
        own = losses * pairs.shares[: len(z)]
        if settings.reduction == "none":
            return own.to(z.dtype)
        total = own.sum()
        return (total if ranks is None else ranks.sum(total)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "supcon_loss: second derivatives (create_graph=True) exist only with "
                'backend="reference"'
            )
        z, lse, pulls = ctx.saved_tensors
        pairs, ranks, settings = ctx.pairs, ctx.ranks, ctx.settings
        grad = grad.double()
        if settings.reduction == "none" and ranks is not None:
            grad = torch.cat([grad, ranks.rows_of_others(grad)])
        upstream = grad * pairs.shares
        if settings.negatives == "all":
            dz = _grad_against_all(z, pairs, settings, lse, upstream)
        else:
            dz = _grad_against_other_classes(z, pairs, settings, lse, pulls, upstream)
        world_size = 1 if ranks is None else ranks.size
        # DDP divides by the world size, but the loss is already that of all ranks
        return dz * (world_size / settings.temperature), None, None, None


def _forward_passes(
    z: Tensor, pairs: Pairs, ranks: Ranks | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every anchor: LSE (or B) and mean sigmoid pull (zeros unless negatives="other").
    Of the own anchors: L_i, 0 where the share is 0. All float64."""
    keys = pairs.keys(z)
    other_only = settings.negatives == "other"
    lse = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for block in pairs.group_blocks:
        labels = pairs.key_labels[block.members] if other_only else None
        lse[block.members[: block.num_own]] = log_sum_exp(
            keys[block.members], block.num_own, settings.temperature, labels
        )
    lse = _of_every_anchor(lse, ranks)
    num_positives = pairs.num_positives[: len(z)].clamp_min(1)
    if other_only:
        losses, pulls = _meet_positives(keys, pairs, settings, lse)
        pulls = _of_every_anchor(pulls / num_positives, ranks)
        losses = losses / num_positives
    else:
        pulls = torch.zeros_like(lse)
        positive_sums = pairs.cell_sums[pairs.cells[: len(z)]]
        attraction = ((positive_sums - z) * z).sum(1).double()
        losses = lse[: len(z)] - attraction / settings.temperature / num_positives
    return lse, pulls, losses.masked_fill(pairs.shares[: len(z)] == 0, 0)


def _meet_positives(
    keys: Tensor, pairs: Pairs, settings: _Settings, lse: Tensor
) -> tuple[Tensor, Tensor]:
    losses = torch.zeros(pairs.num_own, dtype=torch.float64, device=keys.device)
    pulls = torch.zeros_like(losses)
    bound = _finite_per_key(pairs, lse)
    for block in pairs.cell_blocks:
        own = block.members[: block.num_own]
        losses[own], pulls[own] = positive_terms(
            keys[block.members], block.num_own, settings.temperature, bound[block.members]
        )
    return losses, pulls


def _grad_against_all(
    z: Tensor, pairs: Pairs, settings: _Settings, lse: Tensor, upstream: Tensor
) -> Tensor:
    """temperature * dz for negatives="all"."""
    keys, num_own = pairs.keys(z), len(z)
    dz = _repulsion(keys, pairs, settings, lse, upstream)
    upstream = upstream.to(z.dtype)[:, None]
    anchors = keys[: len(pairs.cells)]
    weighted_sums = sum_rows(
        anchors * upstream,
        pairs.cells,
        len(pairs.cell_sums),
        deterministic=settings.deterministic,
    )  # G
    cells, own = pairs.cells[:num_own], upstream[:num_own]
    pull = own * (pairs.cell_sums[cells] - 2 * z) + weighted_sums[cells]
    return dz.sub_(pull.div_(pairs.num_positives[:num_own, None].clamp_min(1)))


def _grad_against_other_classes(
    z: Tensor, pairs: Pairs, settings: _Settings, lse: Tensor, pulls: Tensor, upstream: Tensor
) -> Tensor:
    """temperature * dz for negatives="other"."""
    keys = pairs.keys(z)
    dz = _repulsion(keys, pairs, settings, lse, upstream * pulls)
    bound = _finite_per_key(pairs, lse)
    upstream = pairs.per_key(upstream / pairs.num_positives.clamp_min(1), of_bank=0)
    for block in pairs.cell_blocks:
        members = block.members
        dz[members[: block.num_own]] -= sigmoid_weighted_keys(
            keys[members],
            block.num_own,
            settings.temperature,
            negative_lse=bound[members],
            upstream=upstream[members],
        )
    return dz


def _repulsion(
    keys: Tensor, pairs: Pairs, settings: _Settings, lse: Tensor, upstream: Tensor
) -> Tensor:
    lse = pairs.per_key(lse, of_bank=NEVER)
    upstream = pairs.per_key(upstream, of_bank=0)
    result = torch.zeros_like(keys[: pairs.num_own])
    for block in pairs.group_blocks:
        members = block.members
        result[members[: block.num_own]] = softmax_weighted_keys(
            keys[members],
            block.num_own,
            settings.temperature,
            lse=lse[members],
            upstream=upstream[members],
            key_labels=pairs.key_labels[members] if settings.negatives == "other" else None,
        )
    return result


def _finite_per_key(pairs: Pairs, lse: Tensor) -> Tensor:
    """B of every key; any finite number for one that has no negative, its share is 0."""
    return pairs.per_key(lse.masked_fill(lse == NEVER, 0), of_bank=0)


def _of_every_anchor(own: Tensor, ranks: Ranks | None) -> Tensor:
    return own if ranks is None else torch.cat([own, ranks.rows_of_others(own)])
