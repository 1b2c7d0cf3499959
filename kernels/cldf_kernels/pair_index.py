"""`PairIndex`: which keys are positives and negatives of an anchor, and how much an anchor counts.

Keys stand in this order: local anchors (this rank's), other ranks' anchors, bank entries. A
*positive set* is one class in one group: the anchors that are each other's positives. The bank
belongs to every group.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from cldf_kernels.arguments import HALF_TYPES, Batch, Negatives, Reduction
from cldf_kernels.batch_statistics import BatchStatistics, batch_statistics
from cldf_kernels.ranks import Ranks
from cldf_kernels.segment_sum import MAX_MATRIX_SEGMENTS, segment_count, segment_sum


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels, one row each."""

    z: Float[Tensor, "pixels features"]
    labels: Int64[Tensor, " pixels"]
    groups: Int64[Tensor, " pixels"] | None
    weights: Float64[Tensor, " pixels"] | None  # None: all 1


@dataclass(frozen=True)
class Bank:
    """Constant keys, one row each."""

    z: Float[Tensor, "entries features"]
    labels: Int64[Tensor, " entries"]


@dataclass(frozen=True)
class PairIndex:
    """Everything about the keys but the local anchors' embeddings."""

    num_local: int
    other_keys: Float[Tensor, "other features"]  # other ranks' anchors, then the bank
    key_labels: Int64[Tensor, " keys"]  # 0, 1, ...
    groups: Int64[Tensor, " anchors"] | None  # 0, 1, ...; None: all are of one group
    positive_sets: Int64[Tensor, " anchors"]  # numbered by group, then by label; one may be empty
    group_of_set: Int64[Tensor, " sets"] | None  # None: all are of one group
    label_of_set: Int64[Tensor, " sets"]
    positive_sums: Float[Tensor, "sets features"]  # sum of the keys of each set, with the bank's
    num_positives: Float64[Tensor, " anchors"]  # at least 1
    anchor_weights: Float64[Tensor, " anchors"]  # d loss / d L_i; 0: the anchor does not count
    uniform: bool  # whether all anchors of a positive set surely have the same weight
    max_squared_norm: float | None  # largest |z|^2 of all keys; None: not known yet
    negatives: Negatives

    @property
    def num_anchors(self) -> int:
        """The number of labelled pixels of all ranks."""
        return len(self.positive_sets)

    @property
    def num_keys(self) -> int:
        """The number of anchors and bank entries."""
        return len(self.key_labels)

    def keys(self, z: Float[Tensor, "local features"]) -> Float[Tensor, "keys features"]:
        """Return all keys, given the local anchors."""
        return torch.cat([z, self.other_keys]) if len(self.other_keys) else z

    def per_key(
        self, of_anchors: Float64[Tensor, " anchors"], *, of_bank: float
    ) -> Float64[Tensor, " keys"]:
        """Return one value per key: those of the anchors, then `of_bank` for every bank entry."""
        num_bank = self.num_keys - self.num_anchors
        if num_bank == 0:
            return of_anchors
        return torch.cat([of_anchors, of_anchors.new_full((num_bank,), of_bank)])


@dataclass(frozen=True)
class IndexedBatch:
    """The labelled pixels of a batch, and the keys that they meet."""

    z: Float[Tensor, "local features"]  # attached to the graph
    positions: Int64[Tensor, " local"] | None  # of these pixels in the batch; None: all of them
    num_pixels: int  # of the batch, unlabelled ones included
    index: PairIndex
    ranks: Ranks | None


def index_batch(
    batch: Batch,
    *,
    negatives: Negatives,
    reduction: Reduction,
    process_group: dist.ProcessGroup | None,
    deterministic: bool,
) -> IndexedBatch:
    """Return the labelled pixels, in float32 or float64, and the index of all keys they meet.

    Raises:
        ValueError: a weight of this rank is negative or not finite.
    """
    labels, group, weight = batch.labels, batch.group, batch.weight
    z = batch.embeddings.float() if batch.embeddings.dtype in HALF_TYPES else batch.embeddings
    statistics, ranks = batch_statistics(z.detach(), labels, weight, process_group)
    positions = None
    if statistics.num_unlabelled:
        num_labelled = len(z) - statistics.num_unlabelled
        positions = torch.nonzero_static(labels >= 0, size=num_labelled).squeeze(1)
    labelled_z = _select(z, positions)
    if weight is None and statistics.has_weights:
        weight = torch.ones_like(labels, dtype=torch.float64)
    pixels = Pixels(
        z=labelled_z.detach(),
        labels=_select(labels, positions).to(torch.int64, copy=True),  # backward reads them too
        groups=None if group is None else _select(group, positions).long(),
        weights=None if weight is None else _select(weight, positions).double(),
    )
    entries = None
    if batch.bank is not None and batch.bank_labels is not None:
        listed = batch.bank_labels >= 0
        entries = Bank(batch.bank[listed].to(z.dtype), batch.bank_labels[listed].long())
    index = build_index(
        pixels,
        entries,
        ranks,
        statistics,
        negatives=negatives,
        reduction=reduction,
        deterministic=deterministic,
    )
    return IndexedBatch(
        z=labelled_z, positions=positions, num_pixels=len(z), index=index, ranks=ranks
    )


def build_index(
    pixels: Pixels,
    bank: Bank | None,
    ranks: Ranks | None,
    statistics: BatchStatistics,
    *,
    negatives: Negatives,
    reduction: Reduction,
    deterministic: bool,
) -> PairIndex:
    """Collect the keys of all ranks; decide which anchors count, and how much.

    An anchor counts if it has a positive, and with negatives="other" a negative too.

    Returns:
        The index of the keys of all ranks, the local anchors first.
    """
    anchors = pixels if ranks is None else _with_other_ranks(pixels, ranks)
    num_local, num_anchors = len(pixels.z), len(anchors.labels)
    num_labels, key_labels = _number_labels(anchors.labels, bank, statistics)
    sets = _positive_sets(key_labels[:num_anchors], num_labels, anchors.groups)
    num_sets = len(sets.label_of_set)
    set_sizes = segment_count(sets.ids, num_sets)
    positive_sums = segment_sum(anchors.z, sets.ids, num_sets, deterministic=deterministic)
    positives = set_sizes - 1  # of an anchor of each set
    other_keys, num_bank = anchors.z[num_local:], 0
    if bank is not None:
        num_bank, bank_labels = len(bank.labels), key_labels[num_anchors:]
        positives = positives + segment_count(bank_labels, num_labels)[sets.label_of_set]
        bank_sums = segment_sum(bank.z, bank_labels, num_labels, deterministic=deterministic)
        positive_sums = positive_sums + bank_sums[sets.label_of_set]
        other_keys = torch.cat([other_keys, bank.z])
    counted = positives > 0
    if negatives == "other":
        counted = counted & (_group_sizes(sets, num_anchors) - 1 + num_bank > positives)
    return PairIndex(
        num_local=num_local,
        other_keys=other_keys,
        key_labels=key_labels,
        groups=sets.groups,
        positive_sets=sets.ids,
        group_of_set=sets.group_of_set,
        label_of_set=sets.label_of_set,
        positive_sums=positive_sums,
        num_positives=positives.double().clamp_min_(1).index_select(0, sets.ids),
        anchor_weights=_anchor_weights(anchors.weights, counted, set_sizes, sets.ids, reduction),
        uniform=anchors.weights is None and reduction != "none",
        max_squared_norm=statistics.max_squared_norm if bank is None else None,
        negatives=negatives,
    )


def _select(values: Tensor, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(0, positions)


class _PositiveSets(NamedTuple):
    """The fields of `PairIndex` that number the positive sets."""

    ids: Tensor  # of every anchor
    groups: Tensor | None
    group_of_set: Tensor | None
    label_of_set: Tensor


def _positive_sets(labels: Tensor, num_labels: int, groups: Tensor | None) -> _PositiveSets:
    label_names = torch.arange(num_labels, device=labels.device)
    if groups is None:
        return _PositiveSets(labels, None, None, label_names)
    _, groups = torch.unique(groups, return_inverse=True)
    names, ids = torch.unique(groups * num_labels + labels, return_inverse=True)
    divisor = max(num_labels, 1)
    return _PositiveSets(ids, groups, names // divisor, names % divisor)


def _group_sizes(sets: _PositiveSets, num_anchors: int) -> Tensor | int:
    """Return the number of anchors in the group of each positive set."""
    if sets.groups is None or sets.group_of_set is None:
        return num_anchors
    num_groups = int(sets.group_of_set.max()) + 1 if len(sets.group_of_set) else 0
    return segment_count(sets.groups, num_groups)[sets.group_of_set]


def _number_labels(
    labels: Tensor, bank: Bank | None, statistics: BatchStatistics
) -> tuple[int, Int64[Tensor, " keys"]]:
    """Return an upper bound of the number of labels, and the label of every key as 0, 1, ..."""
    if bank is None and statistics.max_label < MAX_MATRIX_SEGMENTS:
        return statistics.max_label + 1, labels  # as they are: no sort, and no wait for it
    names, numbers = torch.unique(
        labels if bank is None else torch.cat([labels, bank.labels]), return_inverse=True
    )
    return len(names), numbers


def _with_other_ranks(pixels: Pixels, ranks: Ranks) -> Pixels:
    """Return the anchors of all ranks, the local ones first."""
    ids = pixels.labels[:, None]
    if pixels.groups is not None:
        ids = torch.stack([pixels.labels, pixels.groups], dim=1)
    ids = ranks.gather(ids)
    return Pixels(
        z=ranks.gather(pixels.z),
        labels=ids[:, 0],
        groups=None if pixels.groups is None else ids[:, 1],
        weights=None if pixels.weights is None else ranks.gather(pixels.weights),
    )


def _anchor_weights(
    weights: Tensor | None,
    counted: Bool[Tensor, " sets"],
    set_sizes: Int64[Tensor, " sets"],
    ids: Int64[Tensor, " anchors"],
    reduction: Reduction,
) -> Float64[Tensor, " anchors"]:
    """Return d loss / d L_i of every anchor; `counted` says which positive sets count."""
    if weights is None:
        of_sets = counted.double()
        if reduction == "mean":
            of_sets = of_sets / (of_sets * set_sizes).sum().clamp_min_(1)
        return of_sets.index_select(0, ids)
    anchor_weights = weights * counted.index_select(0, ids)
    if reduction != "mean":
        return anchor_weights
    total = anchor_weights.sum()
    return anchor_weights / torch.where(total > 0, total, 1)
