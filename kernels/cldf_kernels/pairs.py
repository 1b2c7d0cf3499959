"""Who meets whom: labels, groups, ranks and bank turned into cells and shares of the loss.

Keys stand in the order: own anchors, other ranks' anchors, bank. A cell is one class in one group:
the anchors that are each other's positives. The bank belongs to every group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.gather import Ranks

MAX_MATRIX_CLASSES = 64  # up to here, class sums on a GPU are a product with a 0/1 matrix
GPU_CHUNK, CPU_CHUNK = 65536, 1024  # rows that are taken to float64 at a time


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels, one row each."""

    z: Tensor
    labels: Tensor
    groups: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Bank:
    """Constant keys, one row each."""

    z: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pairs:
    """Everything about the keys but the own anchors' embeddings."""

    num_own: int
    foreign_keys: Tensor  # (other anchors + bank, features)
    key_labels: Tensor  # of every key, 0, 1, ...
    groups: Tensor | None  # of every anchor, 0, 1, ...; None: all meet
    cells: Tensor  # of every anchor; numbered by group, then by label
    group_of_cell: Tensor
    label_of_cell: Tensor
    cell_sums: Tensor  # (cells, features), bank included
    num_positives: Tensor  # of every anchor
    shares: Tensor  # of every anchor: d loss / d L_i, float64, 0 for one that does not count
    negatives: Negatives

    @property
    def num_anchors(self) -> int:
        return len(self.cells)

    @property
    def num_keys(self) -> int:
        return len(self.key_labels)

    def keys(self, z: Tensor) -> Tensor:
        """All keys, given the own anchors."""
        return torch.cat([z, self.foreign_keys]) if len(self.foreign_keys) else z

    def per_key(self, of_anchors: Tensor, *, of_bank: float) -> Tensor:
        """One value per key: those of the anchors, then `of_bank` for every bank entry."""
        num_bank = self.num_keys - self.num_anchors
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
    if anchors.groups is None:
        groups, cells = None, labels
        cell_ids = torch.arange(num_labels, device=labels.device)
        cell_sizes = torch.bincount(labels, minlength=num_labels)
    else:
        _, groups = torch.unique(anchors.groups, return_inverse=True)
        cell_ids, cells, cell_sizes = torch.unique(
            groups * num_labels + labels, return_inverse=True, return_counts=True
        )
    label_of_cell = cell_ids % max(num_labels, 1)

    bank_sizes = torch.bincount(bank_labels, minlength=num_labels)
    num_positives = (cell_sizes - 1 + bank_sizes[label_of_cell])[cells]
    counted = num_positives > 0
    if negatives == "other":
        num_anchors_met = num_anchors if groups is None else torch.bincount(groups)[groups]
        counted = counted & (num_anchors_met - 1 + len(bank.labels) > num_positives)
    bank_sums = sum_rows(bank.z, bank_labels, num_labels, deterministic=deterministic)
    cell_sums = sum_rows(anchors.z, cells, len(cell_ids), deterministic=deterministic)
    return Pairs(
        num_own=num_own,
        foreign_keys=torch.cat([anchors.z[num_own:], bank.z]),
        key_labels=key_labels,
        groups=groups,
        cells=cells,
        group_of_cell=cell_ids // max(num_labels, 1),
        label_of_cell=label_of_cell,
        cell_sums=cell_sums + bank_sums[label_of_cell],
        num_positives=num_positives,
        shares=_shares(anchors.weights, counted, reduction),
        negatives=negatives,
    )


def sum_rows(
    rows: Tensor, ids: Tensor, num_ids: int, *, deterministic: bool, weights: Tensor | None = None
) -> Tensor:
    """Sum of the rows of each id, each times its weight: (num_ids, features), taken in float64."""
    sums = torch.zeros(num_ids, rows.shape[1], dtype=torch.float64, device=rows.device)
    names = torch.arange(num_ids, device=rows.device)
    chunk = GPU_CHUNK if rows.is_cuda else CPU_CHUNK
    for first in range(0, len(rows), chunk):
        part = slice(first, first + chunk)
        values, part_ids = rows[part].double(), ids[part]
        if weights is not None:
            values = values * weights[part, None]  # not in place: of float64 it would be the rows
        if rows.is_cuda and deterministic:  # index_add_ adds atomically there, index_put_ sorts
            sums.index_put_((part_ids,), values, accumulate=True)
        elif rows.is_cuda and num_ids <= MAX_MATRIX_CLASSES:  # atomics would meet at few addresses
            sums.addmm_((names[:, None] == part_ids).double(), values)
        else:
            sums.index_add_(0, part_ids, values)
    return sums.to(rows.dtype)


def _with_other_ranks(pixels: Pixels, ranks: Ranks) -> Pixels:
    """The anchors of all ranks, the own ones first."""
    ids = pixels.labels[:, None]
    if pixels.groups is not None:
        ids = torch.stack([pixels.labels, pixels.groups], dim=1)
    other_ids = ranks.rows_of_others(ids)
    groups = None
    if pixels.groups is not None:
        groups = torch.cat([pixels.groups, other_ids[:, 1]])
    return Pixels(
        z=torch.cat([pixels.z, ranks.rows_of_others(pixels.z)]),
        labels=torch.cat([pixels.labels, other_ids[:, 0]]),
        groups=groups,
        weights=torch.cat([pixels.weights, ranks.rows_of_others(pixels.weights)]),
    )


def _shares(weights: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    shares = weights * counted
    if reduction != "mean":
        return shares
    total = shares.sum()
    return shares / torch.where(total > 0, total, 1)
