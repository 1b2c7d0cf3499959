"""Who meets whom: labels, groups, ranks and bank turned into blocks of keys and shares of the loss.

Keys stand in the order: own anchors, other ranks' anchors, bank. A cell is one class in one group:
the anchors that are each other's positives. The bank belongs to every group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.gather import Ranks


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels, one row each."""

    z: Tensor
    labels: Tensor
    groups: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Bank:
    """Constant keys, one row each."""

    z: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Block:
    """Keys that meet each other; the first `num_own` are own anchors."""

    members: Tensor
    num_own: int


@dataclass(frozen=True)
class Pairs:
    """Everything about the keys but the own anchors' embeddings."""

    foreign_keys: Tensor  # (other anchors + bank, features)
    key_labels: Tensor  # of every key
    cells: Tensor  # of every anchor
    cell_sums: Tensor  # (cells, features), bank included
    num_positives: Tensor  # of every anchor
    shares: Tensor  # of every anchor: d loss / d L_i, float64, 0 for one that does not count
    group_blocks: list[Block]
    cell_blocks: list[Block]  # empty where positives never meet pair by pair

    @property
    def num_own(self) -> int:
        return len(self.key_labels) - len(self.foreign_keys)

    def keys(self, z: Tensor) -> Tensor:
        """All keys, given the own anchors."""
        return torch.cat([z, self.foreign_keys]) if len(self.foreign_keys) else z

    def per_key(self, of_anchors: Tensor, *, of_bank: float) -> Tensor:
        """One value per key: those of the anchors, then `of_bank` for every bank entry."""
        num_bank = len(self.key_labels) - len(self.cells)
        return torch.cat([of_anchors, of_anchors.new_full((num_bank,), of_bank)])


def pair_up(
    pixels: Pixels,
    bank: Bank,
    ranks: Ranks | None,
    *,
    negatives: Negatives,
    reduction: Reduction,
    deterministic: bool,
) -> Pairs:
    """Collect the keys of all ranks; decide which anchors count, and how much."""
    num_own = len(pixels.z)
    anchors = pixels if ranks is None else _with_other_ranks(pixels, ranks)
    num_anchors = len(anchors.labels)
    label_ids, key_labels = torch.unique(
        torch.cat([anchors.labels, bank.labels]), return_inverse=True
    )
    num_labels = len(label_ids)
    labels, bank_labels = key_labels.split([num_anchors, len(bank.labels)])
    _, groups = torch.unique(anchors.groups, return_inverse=True)
    cell_ids, cells, cell_sizes = torch.unique(
        groups * num_labels + labels, return_inverse=True, return_counts=True
    )
    label_of_cell = cell_ids % max(num_labels, 1)

    bank_sizes = torch.bincount(bank_labels, minlength=num_labels)
    num_positives = (cell_sizes - 1 + bank_sizes[label_of_cell])[cells]
    counted = num_positives > 0
    if negatives == "other":
        num_met = (torch.bincount(groups) - 1 + len(bank.labels))[groups]
        counted = counted & (num_met > num_positives)
    bank_sums = sum_rows(bank.z, bank_labels, num_labels, deterministic=deterministic)
    cell_sums = sum_rows(anchors.z, cells, len(cell_ids), deterministic=deterministic)
    in_bank = torch.arange(num_anchors, len(key_labels), device=cells.device)
    cell_blocks = []
    if negatives == "other":
        bank_of_label = _indices_by(bank_labels, num_labels)
        extra = [num_anchors + bank_of_label[label] for label in label_of_cell.tolist()]
        cell_blocks = _blocks(cells, num_own, extra)
    return Pairs(
        foreign_keys=torch.cat([anchors.z[num_own:], bank.z]),
        key_labels=key_labels,
        cells=cells,
        cell_sums=cell_sums + bank_sums[label_of_cell],
        num_positives=num_positives,
        shares=_shares(anchors.weights, counted, reduction),
        group_blocks=_blocks(groups, num_own, [in_bank]),
        cell_blocks=cell_blocks,
    )


def sum_rows(rows: Tensor, ids: Tensor, num_ids: int, *, deterministic: bool) -> Tensor:
    """Sum of the rows of each id, (num_ids, features), accumulated in float64."""
    sums = torch.zeros(num_ids, rows.shape[1], dtype=torch.float64, device=rows.device)
    if deterministic and rows.is_cuda:  # index_add_ adds atomically there, index_put_ sorts first
        sums.index_put_((ids,), rows.double(), accumulate=True)
    else:
        sums.index_add_(0, ids, rows.double())
    return sums.to(rows.dtype)


def _with_other_ranks(pixels: Pixels, ranks: Ranks) -> Pixels:
    """The anchors of all ranks, the own ones first."""
    ids = torch.stack([pixels.labels, pixels.groups], dim=1)
    other_ids = ranks.rows_of_others(ids)
    return Pixels(
        z=torch.cat([pixels.z, ranks.rows_of_others(pixels.z)]),
        labels=torch.cat([pixels.labels, other_ids[:, 0]]),
        groups=torch.cat([pixels.groups, other_ids[:, 1]]),
        weights=torch.cat([pixels.weights, ranks.rows_of_others(pixels.weights)]),
    )


def _shares(weights: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    shares = weights * counted
    if reduction != "mean":
        return shares
    total = shares.sum()
    return shares / torch.where(total > 0, total, 1)


def _blocks(ids: Tensor, num_own: int, extra: list[Tensor]) -> list[Block]:
    """The anchors of each id and the `extra` keys of that id, or the same ones for all ids."""
    members = _indices_by(ids, int(ids.max()) + 1 if len(ids) else 0)
    owned = torch.bincount(ids[:num_own], minlength=len(members)).tolist()
    if len(extra) == 1:
        extra = extra * len(members)
    triples = zip(members, extra, owned, strict=True)
    return [Block(torch.cat([own, more]), num) for own, more, num in triples if num]


def _indices_by(ids: Tensor, num_ids: int) -> list[Tensor]:
    """Positions of each id, ascending."""
    sizes = torch.bincount(ids, minlength=num_ids).tolist()
    return list(torch.split(torch.argsort(ids, stable=True), sizes))
