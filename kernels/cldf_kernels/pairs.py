"""Who meets whom: labels, groups, ranks and bank turned into cells and shares of the loss.

Keys stand in the order: own anchors, other ranks' anchors, bank. A cell is one class in one group:
the anchors that are each other's positives. The bank belongs to every group.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.gather import Ranks
from cldf_kernels.survey import Facts

# up to here, labels number the classes themselves, and sums on a GPU are a 0/1 matrix product
MAX_MATRIX_CLASSES = 64
GPU_CHUNK, CPU_CHUNK = 65536, 1024  # rows that are taken to float64 at a time
SPREAD, SPREAD_SUMS = 512, 16384  # places of one sum, and of all of them, in deterministic sums


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels, one row each."""

    z: Tensor
    labels: Tensor
    groups: Tensor | None
    weights: Tensor | None  # None: all 1


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
    cells: Tensor  # of every anchor; numbered by group, then by label; one may be empty
    group_of_cell: Tensor | None  # None: all meet
    label_of_cell: Tensor
    cell_sums: Tensor  # (cells, features), bank included
    num_positives: Tensor  # of every anchor, at least 1, float64
    shares: Tensor  # of every anchor: d loss / d L_i, float64, 0 for one that does not count
    uniform: bool  # whether all anchors of a cell surely have the same share
    largest: float | None  # |z|^2 of all keys; None: not known yet
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
        if num_bank == 0:
            return of_anchors
        return torch.cat([of_anchors, of_anchors.new_full((num_bank,), of_bank)])


def pair_up(
    pixels: Pixels,
    bank: Bank | None,
    ranks: Ranks | None,
    facts: Facts,
    *,
    negatives: Negatives,
    reduction: Reduction,
    deterministic: bool,
) -> Pairs:
    """Collect the keys of all ranks; decide which anchors count, and how much."""
    num_own = len(pixels.z)
    anchors = pixels if ranks is None else _with_other_ranks(pixels, ranks)
    num_anchors = len(anchors.labels)
    num_labels, key_labels = _number_labels(anchors.labels, bank, facts)
    labels = key_labels[:num_anchors]
    label_names = torch.arange(num_labels, device=labels.device)
    groups, cells, group_of_cell, label_of_cell = None, labels, None, label_names
    if anchors.groups is not None:
        _, groups = torch.unique(anchors.groups, return_inverse=True)
        cell_ids, cells = torch.unique(groups * num_labels + labels, return_inverse=True)
        group_of_cell = cell_ids // max(num_labels, 1)
        label_of_cell = cell_ids % max(num_labels, 1)
    num_cells = len(label_of_cell)
    cell_sizes = _count(cells, num_cells)
    cell_sums = sum_rows(anchors.z, cells, num_cells, deterministic=deterministic)
    positives = cell_sizes - 1  # of an anchor of each cell
    foreign_keys, num_bank = anchors.z[num_own:], 0
    if bank is not None:
        num_bank, bank_labels = len(bank.labels), key_labels[num_anchors:]
        positives = positives + _count(bank_labels, num_labels)[label_of_cell]
        bank_sums = sum_rows(bank.z, bank_labels, num_labels, deterministic=deterministic)
        cell_sums = cell_sums + bank_sums[label_of_cell]
        foreign_keys = torch.cat([foreign_keys, bank.z])
    counted = positives > 0
    if negatives == "other":
        met: int | Tensor = num_anchors
        if groups is not None and group_of_cell is not None:
            num_groups = int(group_of_cell.max()) + 1 if num_cells else 0
            met = _count(groups, num_groups)[group_of_cell]
        counted = counted & (met - 1 + num_bank > positives)
    return Pairs(
        num_own=num_own,
        foreign_keys=foreign_keys,
        key_labels=key_labels,
        groups=groups,
        cells=cells,
        group_of_cell=group_of_cell,
        label_of_cell=label_of_cell,
        cell_sums=cell_sums,
        num_positives=positives.double().clamp_min_(1).index_select(0, cells),
        shares=_shares(anchors.weights, counted, cell_sizes, cells, reduction),
        uniform=anchors.weights is None and reduction != "none",
        largest=facts.largest if bank is None else None,
        negatives=negatives,
    )


def sum_rows(
    rows: Tensor, ids: Tensor, num_ids: int, *, deterministic: bool, weights: Tensor | None = None
) -> Tensor:
    """Sum of the rows of each id, each times its weight: (num_ids, features), taken in float64."""
    if rows.is_cuda and deterministic:
        sums = _spread_sums(rows, ids, num_ids, weights)
    elif rows.is_cuda and num_ids <= MAX_MATRIX_CLASSES:
        sums = _matrix_sums(rows, ids, num_ids, weights)
    else:
        sums = torch.zeros(num_ids, rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in _chunks(rows):
            sums.index_add_(0, ids[part], _weighted(rows, weights, part))
    return sums.to(rows.dtype)


def _spread_sums(rows: Tensor, ids: Tensor, num_ids: int, weights: Tensor | None) -> Tensor:
    """In an order that never changes: index_add_ adds atomically on a GPU. index_put_ sorts, and
    adds what belongs to one place one after the other: so each sum is spread over many places."""
    spread = min(SPREAD, max(SPREAD_SUMS // max(num_ids, 1), 1))
    shape = (num_ids * spread, rows.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    for part in _chunks(rows):
        turns = torch.arange(len(ids[part]), device=rows.device) % spread
        places = ids[part] * spread + turns
        sums.index_put_((places,), _weighted(rows, weights, part), accumulate=True)
    return sums.view(num_ids, spread, shape[1]).sum(1)


def _matrix_sums(rows: Tensor, ids: Tensor, num_ids: int, weights: Tensor | None) -> Tensor:
    """As a product with a 0/1 matrix: on a GPU, atomics would meet at few addresses."""
    names = torch.arange(num_ids, device=rows.device)[:, None]
    parts = []
    for part in _chunks(rows):
        one_hot = torch.empty(num_ids, len(ids[part]), dtype=torch.float64, device=rows.device)
        torch.eq(ids[part], names, out=one_hot)
        if weights is not None:
            one_hot *= weights[part]
        parts.append(one_hot @ rows[part].double())
    return functools.reduce(torch.add, parts) if parts else rows.new_zeros(num_ids, rows.shape[1])


def _weighted(rows: Tensor, weights: Tensor | None, part: slice) -> Tensor:
    values = rows[part].double()
    # not in place: of float64 it would be the rows
    return values if weights is None else values * weights[part, None]


def _chunks(rows: Tensor) -> list[slice]:
    size = GPU_CHUNK if rows.is_cuda else CPU_CHUNK
    return [slice(first, first + size) for first in range(0, len(rows), size)]


def _number_labels(labels: Tensor, bank: Bank | None, facts: Facts) -> tuple[int, Tensor]:
    """How many labels there are at most, and that of every key as 0, 1, ..."""
    if bank is None and facts.max_label < MAX_MATRIX_CLASSES:
        return facts.max_label + 1, labels  # numbers as they are, no sort and no wait for it
    names, numbers = torch.unique(
        labels if bank is None else torch.cat([labels, bank.labels]), return_inverse=True
    )
    return len(names), numbers


def _count(ids: Tensor, num_ids: int) -> Tensor:
    """How many there are of each id; bincount would wait for the device."""
    if ids.is_cuda and num_ids <= MAX_MATRIX_CLASSES:
        return (ids == torch.arange(num_ids, device=ids.device)[:, None]).sum(1)
    counts = torch.zeros(num_ids, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def _with_other_ranks(pixels: Pixels, ranks: Ranks) -> Pixels:
    """The anchors of all ranks, the own ones first."""
    ids = pixels.labels[:, None]
    if pixels.groups is not None:
        ids = torch.stack([pixels.labels, pixels.groups], dim=1)
    other_ids = ranks.rows_of_others(ids)
    groups = None
    if pixels.groups is not None:
        groups = torch.cat([pixels.groups, other_ids[:, 1]])
    weights = pixels.weights
    if weights is not None:
        weights = torch.cat([weights, ranks.rows_of_others(weights)])
    return Pixels(
        z=torch.cat([pixels.z, ranks.rows_of_others(pixels.z)]),
        labels=torch.cat([pixels.labels, other_ids[:, 0]]),
        groups=groups,
        weights=weights,
    )


def _shares(
    weights: Tensor | None,
    counted: Tensor,
    cell_sizes: Tensor,
    cells: Tensor,
    reduction: Reduction,
) -> Tensor:
    """Of every anchor; `counted`: of each cell."""
    if weights is None:
        of_cells = counted.double()
        if reduction == "mean":
            of_cells = of_cells / (of_cells * cell_sizes).sum().clamp_min_(1)
        return of_cells.index_select(0, cells)
    shares = weights * counted.index_select(0, cells)
    if reduction != "mean":
        return shares
    total = shares.sum()
    return shares / torch.where(total > 0, total, 1)
