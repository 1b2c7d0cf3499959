"""The N x N work in plain torch: blocks of keys that all meet, each done tile by tile."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cldf_kernels import tile_passes
from cldf_kernels.pairs import Pairs

BankOf = Callable[[int], Tensor]


class Block(NamedTuple):
    """Keys that meet each other: own anchors, other ranks' anchors, bank."""

    own: Tensor | slice
    members: Tensor | slice  # all of them, with or without the bank
    anchors: Tensor | slice
    num_own: int

    def without_bank(self) -> "Block":
        return self._replace(members=self.anchors)


class TiledPasses:
    """`exact.Passes` for any device and float type."""

    name = "torch"

    def __init__(self, z: Tensor, pairs: Pairs, temperature: float) -> None:
        self.pairs, self.temperature = pairs, temperature
        in_bank = torch.arange(pairs.num_anchors, pairs.num_keys, device=z.device)
        if pairs.groups is not None:
            self.groups = _blocks(pairs.groups, pairs.num_own, lambda _: in_bank)
        else:  # slices: nothing is copied
            everything = Block(
                own=slice(pairs.num_own),
                members=slice(pairs.num_keys),
                anchors=slice(pairs.num_anchors),
                num_own=pairs.num_own,
            )
            self.groups = [everything] if pairs.num_own else []
        self.cells: list[Block] = []
        if pairs.negatives == "other":
            bank_labels = pairs.key_labels[pairs.num_anchors :]
            labels = pairs.label_of_cell.tolist()
            self.cells = _blocks(
                pairs.cells, pairs.num_own, lambda cell: in_bank[bank_labels == labels[cell]]
            )

    def log_sum_exp(self, z: Tensor) -> Tensor:
        keys = self.pairs.keys(z)
        lse = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for block in self.groups:
            lse[block.own] = tile_passes.log_sum_exp(
                keys[block.members], block.num_own, self.temperature, self._labels(block)
            )
        return lse

    def softmax_keys(self, z: Tensor, lse: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        keys, result = self.pairs.keys(z), torch.zeros_like(z)
        for whole in self.groups:
            block = whole if bank else whole.without_bank()
            of_block = tile_passes.softmax_weighted_keys(
                keys[block.members],
                block.num_own,
                self.temperature,
                lse=lse[block.members],
                upstream=upstream[block.members],
                key_labels=self._labels(block),
            )
            if isinstance(block.own, slice):  # everything
                return of_block
            result[block.own] = of_block
        return result

    def positive_terms(self, z: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.pairs.keys(z)
        losses = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        pulls = torch.zeros_like(losses)
        for block in self.cells:
            losses[block.own], pulls[block.own] = tile_passes.positive_terms(
                keys[block.members], block.num_own, self.temperature, bound[block.members]
            )
        return losses, pulls

    def sigmoid_keys(self, z: Tensor, bound: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        keys, result = self.pairs.keys(z), torch.zeros_like(z)
        for whole in self.cells:
            block = whole if bank else whole.without_bank()
            result[block.own] = tile_passes.sigmoid_weighted_keys(
                keys[block.members],
                block.num_own,
                self.temperature,
                negative_lse=bound[block.members],
                upstream=upstream[block.members],
            )
        return result

    def _labels(self, block: Block) -> Tensor | None:
        """Labels of the keys where those of the anchor's own are no negatives."""
        return self.pairs.key_labels[block.members] if self.pairs.negatives == "other" else None


def _blocks(ids: Tensor, num_own: int, bank_of: BankOf) -> list[Block]:
    """The anchors of each id that has own ones, with the bank entries that they meet."""
    num_ids = int(ids.max()) + 1 if len(ids) else 0
    members = _indices_by(ids, num_ids)
    owned = torch.bincount(ids[:num_own], minlength=num_ids).tolist()
    return [
        Block(anchors[:num], torch.cat([anchors, bank_of(index)]), anchors, num)
        for index, (anchors, num) in enumerate(zip(members, owned, strict=True))
        if num
    ]


def _indices_by(ids: Tensor, num_ids: int) -> list[Tensor]:
    """Positions of each id, ascending."""
    sizes = torch.bincount(ids, minlength=num_ids).tolist()
    return list(torch.split(torch.argsort(ids, stable=True), sizes))
