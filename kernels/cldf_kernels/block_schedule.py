"""`BlockSchedule`: which ranges of keys each block of queries visits.

Keys are sorted so that all that a query meets stands in a few ranges. Without groups and with
negatives="all" every order does. Else anchors are sorted by group, or by positive set where
classes matter, local ones first within each, and the bank by label. A *segment* is what belongs
together: everything, a group, or a positive set. Its local anchors are divided into blocks of
queries (see `triton_kernels.tiles`), so that no tile mixes classes and none compares labels.
"""

import functools
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from cldf_kernels.pair_index import PairIndex

NUM_REMEMBERED = 16  # schedules without an order, of as many numbers of pixels

Bounds = tuple[Tensor, Tensor]  # first key and end of a range, of each block


class KeyRange(Enum):
    """The keys that a launch visits."""

    SEGMENT = "the anchors of the query's segment"
    OTHER_RANKS = "those of them that are not this rank's"
    OTHER_SEGMENTS = "the anchors of its group outside its segment"
    BANK = "the bank"
    BANK_SAME_CLASS = "the bank entries of its class"
    BANK_OTHER_CLASSES = "the bank entries of other classes"


class TableKey(NamedTuple):
    """The sizes that a table of blocks depends on."""

    key_range: KeyRange
    block_queries: int
    block_keys: int
    num_splits: int
    device: torch.device
    stream: int


@dataclass(frozen=True, eq=False)
class BlockSchedule:
    """Positions are those in the new order; the numbers of segments are on the CPU."""

    key_order: Int64[Tensor, " keys"] | None  # position -> key of `PairIndex`; None: unchanged
    query_order: Int64[Tensor, " local"] | None  # position -> local anchor
    starts: Int64[Tensor, " segments"]  # of each segment's anchors among the keys
    stops: Int64[Tensor, " segments"]
    num_local: Int64[Tensor, " segments"]  # of them local ones, which come first
    group_starts: Int64[Tensor, " segments"]  # of the anchors of its group
    group_stops: Int64[Tensor, " segments"]
    bank_starts: Int64[Tensor, " segments"]  # of the bank entries of its class
    bank_stops: Int64[Tensor, " segments"]
    num_anchors: int
    num_keys: int
    tables: dict[TableKey, Tensor] = field(default_factory=dict)  # what `blocks` has returned

    def blocks(
        self,
        key_range: KeyRange,
        block_queries: int,
        block_keys: int,
        num_splits: int,
        device: torch.device,
    ) -> Int32[Tensor, "blocks fields"]:
        """Return `BLOCK_FIELDS` numbers for each block of queries and each split of its keys.

        Args:
            key_range: the keys that are visited.
            block_queries: the most queries of a block.
            block_keys: the keys of a tile; a split begins at a whole tile.
            num_splits: the number of programs that divide the keys of a block.
            device: where the table is wanted; it is remembered there.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = TableKey(key_range, block_queries, block_keys, num_splits, device, stream)
        if key not in self.tables:
            table = self._table(key_range, block_queries, block_keys, num_splits)
            self.tables[key] = _copy_to_device(table, device)
        return self.tables[key]

    def _table(
        self, key_range: KeyRange, block_queries: int, block_keys: int, num_splits: int
    ) -> Int32[Tensor, "blocks fields"]:
        counts = (self.num_local + block_queries - 1) // block_queries
        segment = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        number = torch.arange(len(segment), device="cpu") - (counts.cumsum(0) - counts)[segment]
        ends = self.num_local.cumsum(0)
        offset = number * block_queries
        first = (ends - self.num_local)[segment] + offset
        last = torch.minimum(first + block_queries, ends[segment])
        ranges = self._ranges(key_range, segment, offset, last - first)
        num_queries = int(self.num_local.sum())
        splits = []
        for split in range(num_splits):
            left = _split_keys(ranges.left, split, num_splits, block_keys)
            right = _split_keys(ranges.right, split, num_splits, block_keys)
            start, stop = ranges.own
            own = (start, stop if split == 0 else start)
            first_result = first + split * num_queries
            splits.append(torch.stack([first, last, *left, *right, *own, first_result], dim=1))
        return torch.cat(splits).to(torch.int32)

    def _ranges(
        self,
        key_range: KeyRange,
        segment: Int64[Tensor, " blocks"],
        offset: Int64[Tensor, " blocks"],
        num_queries: Int64[Tensor, " blocks"],
    ) -> "_BlockKeys":
        """Return the keys of each block, which begins at `offset` in its segment."""
        nothing = torch.zeros_like(segment)
        empty = (nothing, nothing)
        bank = (nothing + self.num_anchors, nothing + self.num_keys)
        own_class = (self.bank_starts[segment], self.bank_stops[segment])
        start, stop = self.starts[segment], self.stops[segment]
        own = (start + offset, start + offset + num_queries)
        group = (self.group_starts[segment], self.group_stops[segment])
        return {
            KeyRange.SEGMENT: _BlockKeys((start, own[0]), (own[1], stop), own),
            KeyRange.OTHER_RANKS: _BlockKeys((start + self.num_local[segment], stop), empty, empty),
            KeyRange.OTHER_SEGMENTS: _BlockKeys((group[0], start), (stop, group[1]), empty),
            KeyRange.BANK: _BlockKeys(bank, empty, empty),
            KeyRange.BANK_SAME_CLASS: _BlockKeys(own_class, empty, empty),
            KeyRange.BANK_OTHER_CLASSES: _BlockKeys(
                (bank[0], own_class[0]), (own_class[1], bank[1]), empty
            ),
        }[key_range]


class _BlockKeys(NamedTuple):
    """Ranges of keys of each block."""

    left: Bounds
    right: Bounds
    own: Bounds  # the queries themselves, between both


def softmax_ranges(index: PairIndex, *, bank: bool) -> list[KeyRange]:
    """Return the keys in an anchor's denominator; those of anchors come first."""
    others = index.negatives == "other"
    ranges = [KeyRange.OTHER_SEGMENTS if others else KeyRange.SEGMENT]
    if bank and index.num_keys > index.num_anchors:
        ranges.append(KeyRange.BANK_OTHER_CLASSES if others else KeyRange.BANK)
    return ranges


def positive_ranges(index: PairIndex, *, bank: bool) -> list[KeyRange]:
    """Return the positives of an anchor, with negatives="other"."""
    if bank and index.num_keys > index.num_anchors:
        return [KeyRange.SEGMENT, KeyRange.BANK_SAME_CLASS]
    return [KeyRange.SEGMENT]


def schedule_blocks(index: PairIndex) -> BlockSchedule:
    """Return the order and the segments that the keys of this index need."""
    if index.negatives == "other":
        return _sorted_schedule(index, index.positive_sets, len(index.label_of_set), by_class=True)
    if index.groups is not None:
        num_groups = int(index.groups.max()) + 1 if index.num_anchors else 0
        return _sorted_schedule(index, index.groups, num_groups, by_class=False)
    return _unsorted_schedule(index.num_local, index.num_anchors, index.num_keys)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _unsorted_schedule(num_local: int, num_anchors: int, num_keys: int) -> BlockSchedule:
    """Return one segment; remembered with its tables: steps of training repeat their shapes."""
    first, last, local = torch.tensor([0, num_anchors, num_local], device="cpu")[:, None]
    return BlockSchedule(
        key_order=None,
        query_order=None,
        starts=first,
        stops=last,
        num_local=local,
        group_starts=first,
        group_stops=last,
        bank_starts=last,
        bank_stops=last,
        num_anchors=num_anchors,
        num_keys=num_keys,
    )


def _sorted_schedule(
    index: PairIndex, ids: Int64[Tensor, " anchors"], num_ids: int, *, by_class: bool
) -> BlockSchedule:
    """Return anchors in segments of the same id.

    Local anchors come first in `PairIndex`, and in each segment, since the sort is stable.
    """
    num_anchors = index.num_anchors
    bank_labels = index.key_labels[num_anchors:]
    key_order = torch.cat(
        [
            torch.argsort(ids, stable=True),
            num_anchors + torch.argsort(bank_labels, stable=True),
        ]
    )
    sizes = torch.bincount(ids, minlength=num_ids).cpu()
    stops = sizes.cumsum(0)
    starts = stops - sizes
    group_starts, group_stops = starts, stops
    bank_starts = bank_stops = torch.full_like(starts, num_anchors)
    if by_class:
        group = torch.zeros(num_ids, dtype=torch.int64, device="cpu")
        if index.group_of_set is not None:
            group = index.group_of_set.cpu()  # ascending
        group_sizes = torch.bincount(group, weights=sizes.double()).long()
        group_stops = group_sizes.cumsum(0)[group]
        group_starts = group_stops - group_sizes[group]
        label = index.label_of_set.cpu()
        num_labels = int(label.max()) + 1 if len(label) else 0
        bank_sizes = torch.bincount(bank_labels, minlength=num_labels).cpu()
        ends = bank_sizes.cumsum(0) + num_anchors
        bank_stops, bank_starts = ends[label], (ends - bank_sizes)[label]
    return BlockSchedule(
        key_order=key_order,
        query_order=torch.argsort(ids[: index.num_local], stable=True),
        starts=starts,
        stops=stops,
        num_local=torch.bincount(ids[: index.num_local], minlength=num_ids).cpu(),
        group_starts=group_starts,
        group_stops=group_stops,
        bank_starts=bank_starts,
        bank_stops=bank_stops,
        num_anchors=num_anchors,
        num_keys=index.num_keys,
    )


def _copy_to_device(table: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device; the host does not wait for it."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def _split_keys(keys: Bounds, split: int, num_splits: int, block_keys: int) -> Bounds:
    """Return one split of a range, which begins at a whole tile; the last one has the rest too."""
    start, stop = keys
    num_tiles = (stop - start) // block_keys
    first = start + num_tiles * split // num_splits * block_keys
    if split == num_splits - 1:
        return first, stop
    return first, start + num_tiles * (split + 1) // num_splits * block_keys
