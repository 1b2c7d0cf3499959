"""Keys in an order in which all that a query meets stands in a few ranges.

Without groups and with negatives="all" every order does. Else anchors are sorted by group, or by
cell where classes matter, own ones first within each, and the bank by label. A *segment* is what
belongs together: everything, a group, or a cell. Its own anchors are cut into blocks of queries
(see `triton_kernels.tiles`), so that no tile mixes classes and none needs a comparison of labels.
"""

import functools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from cldf_kernels.pairs import Pairs

NUM_REMEMBERED = 16  # layouts without an order, of as many numbers of pixels

Range = tuple[Tensor, Tensor]  # first key and end, of each block


class Met(Enum):
    """Which keys a block meets."""

    SEGMENT = "the anchors of its segment"
    OTHER_RANKS = "those of them that are not this rank's"
    REST = "the anchors of its group outside its segment"
    BANK = "the bank"
    OWN_CLASS = "the bank entries of its class"
    OTHER_CLASSES = "the bank entries of other classes"


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions below are those in the new order; these numbers of segments are on the CPU."""

    key_order: Tensor | None  # position -> key of `Pairs`; None: unchanged
    query_order: Tensor | None  # position -> own anchor
    starts: Tensor  # of each segment's anchors among the keys
    stops: Tensor
    num_own: Tensor  # of them own ones, which come first
    group_starts: Tensor  # of the anchors of its group
    group_stops: Tensor
    bank_starts: Tensor  # of its class
    bank_stops: Tensor
    num_anchors: int
    num_keys: int
    tables: dict[Any, Tensor] = field(default_factory=dict)  # what `blocks` has returned

    def blocks(
        self, met: Met, num_rows: int, num_columns: int, num_parts: int, device: torch.device
    ) -> Tensor:
        """`BLOCK_FIELDS` int32 numbers for each block of at most `num_rows` queries and each of
        the parts, in whole tiles of `num_columns`, into which its keys are divided."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (met, num_rows, num_columns, num_parts, device, stream)
        if key not in self.tables:
            table = self._table(met, num_rows, num_columns, num_parts)
            self.tables[key] = _sent(table, device)
        return self.tables[key]

    def _table(self, met: Met, num_rows: int, num_columns: int, num_parts: int) -> Tensor:
        counts = (self.num_own + num_rows - 1) // num_rows
        segment = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        number = torch.arange(len(segment), device="cpu") - (counts.cumsum(0) - counts)[segment]
        ends = self.num_own.cumsum(0)
        first = (ends - self.num_own)[segment] + number * num_rows
        last = torch.minimum(first + num_rows, ends[segment])
        left, right, middle = self._ranges(met, segment, number * num_rows, last - first)
        num_queries = int(self.num_own.sum())
        parts = []
        for part in range(num_parts):
            own = middle if part == 0 else (middle[0], middle[0])
            ranges = (*_cut(left, part, num_parts, num_columns),
                      *_cut(right, part, num_parts, num_columns), *own)  # fmt: skip
            parts.append(torch.stack([first, last, *ranges, first + part * num_queries], dim=1))
        return torch.cat(parts).to(torch.int32)

    def _ranges(
        self, met: Met, segment: Tensor, offset: Tensor, num_rows: Tensor
    ) -> tuple[Range, Range, Range]:
        """The keys left and right of each block's own, and these; `offset`: in its segment."""
        nothing = torch.zeros_like(segment)
        empty = (nothing, nothing)
        bank = (nothing + self.num_anchors, nothing + self.num_keys)
        own_class = (self.bank_starts[segment], self.bank_stops[segment])
        start, stop = self.starts[segment], self.stops[segment]
        own = (start + offset, start + offset + num_rows)
        group = (self.group_starts[segment], self.group_stops[segment])
        return {
            Met.SEGMENT: ((start, own[0]), (own[1], stop), own),
            Met.OTHER_RANKS: ((start + self.num_own[segment], stop), empty, empty),
            Met.REST: ((group[0], start), (stop, group[1]), empty),
            Met.BANK: (bank, empty, empty),
            Met.OWN_CLASS: (own_class, empty, empty),
            Met.OTHER_CLASSES: ((bank[0], own_class[0]), (own_class[1], bank[1]), empty),
        }[met]


def lay_out(pairs: Pairs) -> Layout:
    """The order that these pairs need."""
    if pairs.negatives == "other":
        return _sorted_layout(pairs, pairs.cells, len(pairs.label_of_cell), by_class=True)
    if pairs.groups is not None:
        num_groups = int(pairs.groups.max()) + 1 if pairs.num_anchors else 0
        return _sorted_layout(pairs, pairs.groups, num_groups, by_class=False)
    return _unsorted_layout(pairs.num_own, pairs.num_anchors, pairs.num_keys)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _unsorted_layout(num_own: int, num_anchors: int, num_keys: int) -> Layout:
    """One segment; remembered with its tables, since steps of training repeat their shapes."""
    first, last, own = torch.tensor([0, num_anchors, num_own], device="cpu")[:, None]
    return Layout(
        key_order=None,
        query_order=None,
        starts=first,
        stops=last,
        num_own=own,
        group_starts=first,
        group_stops=last,
        bank_starts=last,
        bank_stops=last,
        num_anchors=num_anchors,
        num_keys=num_keys,
    )


def _sorted_layout(pairs: Pairs, ids: Tensor, num_ids: int, *, by_class: bool) -> Layout:
    """Anchors in segments of the same id. Own ones come first in `Pairs`: the sort is stable."""
    num_anchors = pairs.num_anchors
    bank_labels = pairs.key_labels[num_anchors:]
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
        if pairs.group_of_cell is not None:
            group = pairs.group_of_cell.cpu()  # ascending
        group_sizes = torch.bincount(group, weights=sizes.double()).long()
        group_stops = group_sizes.cumsum(0)[group]
        group_starts = group_stops - group_sizes[group]
        label = pairs.label_of_cell.cpu()
        num_labels = int(label.max()) + 1 if len(label) else 0
        bank_sizes = torch.bincount(bank_labels, minlength=num_labels).cpu()
        ends = bank_sizes.cumsum(0) + num_anchors
        bank_stops, bank_starts = ends[label], (ends - bank_sizes)[label]
    return Layout(
        key_order=key_order,
        query_order=torch.argsort(ids[: pairs.num_own], stable=True),
        starts=starts,
        stops=stops,
        num_own=torch.bincount(ids[: pairs.num_own], minlength=num_ids).cpu(),
        group_starts=group_starts,
        group_stops=group_stops,
        bank_starts=bank_starts,
        bank_stops=bank_stops,
        num_anchors=num_anchors,
        num_keys=pairs.num_keys,
    )


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def _cut(keys: Range, part: int, num_parts: int, num_columns: int) -> Range:
    """One part of a range, cut between whole tiles; the last one has the rest too."""
    start, stop = keys
    num_tiles = (stop - start) // num_columns
    first = start + num_tiles * part // num_parts * num_columns
    if part == num_parts - 1:
        return first, stop
    return first, start + num_tiles * (part + 1) // num_parts * num_columns
