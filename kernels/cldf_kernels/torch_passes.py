"""`TorchPasses`: the N x N work in plain torch, one tile at a time, in O(N D) memory.

The keys of a `KeySet` all meet each other. The local anchors among them come first: pairs of two
of these are visited once and serve both (scores are symmetric). The keys behind them (other ranks,
bank) serve as columns only. No anchor meets itself.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import softplus

from cldf_kernels.pair_index import PairIndex
from cldf_kernels.passes import EMPTY_LSE

# (rows, columns). CPU: a float32 tile stays in the level-2 cache. CUDA: a few launches, 64 MB.
CPU_TILE = (256, 1024)
CUDA_TILE = (2048, 8192)

# Largest |score| for which exp(score), its sums and their inverses need no shift.
PLAIN_EXP_LIMIT = {torch.float32: 40.0, torch.float64: 300.0}

SOFTPLUS_THRESHOLD = 50.0  # linear beyond; torch's own, 20, is off by 2e-9


class KeySet(NamedTuple):
    """Positions of keys that all meet each other: local anchors, other ranks' anchors, bank."""

    local: Tensor | slice
    keys: Tensor | slice  # all of them, with or without the bank
    anchors: Tensor | slice
    num_local: int

    def without_bank(self) -> "KeySet":
        """Return the same set without the bank entries."""
        return self._replace(keys=self.anchors)


class Tile(NamedTuple):
    """One tile of the scores of a key set."""

    rows: slice
    columns: slice
    mirror: slice  # columns that are local anchors below the rows: no other tile visits them


class TorchPasses:
    """`Passes` for any device and float type."""

    def __init__(self, index: PairIndex, *, temperature: float) -> None:
        self.index, self.temperature = index, temperature
        device = index.key_labels.device
        in_bank = torch.arange(index.num_anchors, index.num_keys, device=device)
        if index.groups is not None:
            self.groups = _key_sets(index.groups, index.num_local, lambda _: in_bank)
        else:  # slices: nothing is copied
            everything = KeySet(
                local=slice(index.num_local),
                keys=slice(index.num_keys),
                anchors=slice(index.num_anchors),
                num_local=index.num_local,
            )
            self.groups = [everything] if index.num_local else []
        self.positive_sets: list[KeySet] = []
        if index.negatives == "other":
            bank_labels = index.key_labels[index.num_anchors :]
            labels = index.label_of_set.tolist()
            self.positive_sets = _key_sets(
                index.positive_sets, index.num_local, lambda i: in_bank[bank_labels == labels[i]]
            )

    def lse_forward(self, z: Float[Tensor, "local features"]) -> Float64[Tensor, " local"]:
        """Return log Σ_j exp(s_ij) of each local anchor; see `Passes`."""
        keys = self.index.keys(z)
        lse = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for group in self.groups:
            lse[group.local] = self._lse_forward(
                keys[group.keys], group.num_local, self._labels(group)
            )
        return lse

    def lse_backward(
        self,
        z: Float[Tensor, "local features"],
        lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float[Tensor, "local features"]:
        """Return the keys weighted by both softmaxes; see `Passes`."""
        keys, result = self.index.keys(z), torch.zeros_like(z)
        for whole in self.groups:
            group = whole if bank else whole.without_bank()
            of_group = self._lse_backward(
                keys[group.keys],
                group.num_local,
                lse=lse[group.keys],
                upstream=upstream[group.keys],
                key_labels=self._labels(group),
            )
            if isinstance(group.local, slice):  # everything
                return of_group
            result[group.local] = of_group
        return result

    def softplus_forward(
        self, z: Float[Tensor, "local features"], negative_lse: Float64[Tensor, " keys"]
    ) -> tuple[Float64[Tensor, " local"], Float64[Tensor, " local"]]:
        """Return the sums of softplus(B_i - s_ip) and of its derivative; see `Passes`."""
        keys = self.index.keys(z)
        losses = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        sigmoids = torch.zeros_like(losses)
        for positives in self.positive_sets:
            losses[positives.local], sigmoids[positives.local] = self._softplus_forward(
                keys[positives.keys], positives.num_local, negative_lse[positives.keys]
            )
        return losses, sigmoids

    def softplus_backward(
        self,
        z: Float[Tensor, "local features"],
        negative_lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float[Tensor, "local features"]:
        """Return the keys weighted by both sigmoids; see `Passes`."""
        keys, result = self.index.keys(z), torch.zeros_like(z)
        for whole in self.positive_sets:
            positives = whole if bank else whole.without_bank()
            result[positives.local] = self._softplus_backward(
                keys[positives.keys],
                positives.num_local,
                negative_lse=negative_lse[positives.keys],
                upstream=upstream[positives.keys],
            )
        return result

    def _lse_forward(self, keys: Tensor, num_local: int, key_labels: Tensor | None) -> Tensor:
        if self._plain_exp_is_safe(keys):
            sums = torch.zeros(num_local, dtype=torch.float64, device=keys.device)
            for tile, scores in self._score_tiles(keys, num_local, key_labels=key_labels):
                scores.exp_()
                sums[tile.rows] += scores.sum(1)
                sums[tile.mirror] += _mirrored(scores, tile).sum(0)
            lse = sums.log()
        else:
            lse = torch.full((num_local,), -torch.inf, dtype=torch.float64, device=keys.device)
            for tile, scores in self._score_tiles(keys, num_local, key_labels=key_labels):
                for part, values in ((tile.rows, scores), (tile.mirror, _mirrored(scores, tile).T)):
                    lse[part] = torch.logaddexp(lse[part], values.logsumexp(1).double())
        return lse.masked_fill_(lse == -torch.inf, EMPTY_LSE)

    def _lse_backward(
        self,
        keys: Tensor,
        num_local: int,
        *,
        lse: Tensor,
        upstream: Tensor,
        key_labels: Tensor | None,
    ) -> Tensor:
        plain = self._plain_exp_is_safe(keys)
        coefficients = (upstream * torch.exp(-lse)).to(keys.dtype)
        lse, upstream = lse.to(keys.dtype), upstream.to(keys.dtype)
        result = torch.zeros_like(keys[:num_local])
        for tile, scores in self._score_tiles(keys, num_local, key_labels=key_labels):
            rows, columns = tile.rows, tile.columns
            if plain:
                weights = scores.exp_().mul_(coefficients[rows, None] + coefficients[columns])
            else:
                # no softmax weight exceeds 1, however large the scores' rounding errors are
                weights = (scores - lse[rows, None]).clamp_(max=0).exp_().mul_(upstream[rows, None])
                weights += scores.sub_(lse[columns]).clamp_(max=0).exp_().mul_(upstream[columns])
            _add_weighted(result, weights, keys, tile)
        return result

    def _softplus_forward(
        self, keys: Tensor, num_local: int, negative_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(num_local, dtype=torch.float64, device=keys.device)
        sigmoids = torch.zeros_like(losses)
        negative_lse = negative_lse.to(keys.dtype)
        for tile, scores in self._score_tiles(keys, num_local, self_score=torch.inf):
            for part, values in ((tile.rows, scores), (tile.mirror, _mirrored(scores, tile).T)):
                gaps = negative_lse[part, None] - values
                losses[part] += softplus(gaps, threshold=SOFTPLUS_THRESHOLD).sum(1)
                sigmoids[part] += gaps.sigmoid_().sum(1)
        return losses, sigmoids

    def _softplus_backward(
        self, keys: Tensor, num_local: int, *, negative_lse: Tensor, upstream: Tensor
    ) -> Tensor:
        negative_lse, upstream = negative_lse.to(keys.dtype), upstream.to(keys.dtype)
        result = torch.zeros_like(keys[:num_local])
        for tile, scores in self._score_tiles(keys, num_local, self_score=torch.inf):
            rows, columns = tile.rows, tile.columns
            weights = (negative_lse[rows, None] - scores).sigmoid_().mul_(upstream[rows, None])
            weights += (negative_lse[columns] - scores).sigmoid_().mul_(upstream[columns])
            _add_weighted(result, weights, keys, tile)
        return result

    def _labels(self, group: KeySet) -> Tensor | None:
        """Return the labels of the keys where those of the anchor's own are no negatives."""
        return self.index.key_labels[group.keys] if self.index.negatives == "other" else None

    def _score_tiles(
        self,
        keys: Float[Tensor, "keys features"],
        num_local: int,
        *,
        self_score: float = -torch.inf,
        key_labels: Int64[Tensor, " keys"] | None = None,
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Yield the scores of each tile in a buffer that the next tile reuses.

        An anchor with itself scores `self_score`. With `key_labels` every pair of one label scores
        -inf.
        """
        tile_rows, tile_columns = CUDA_TILE if keys.is_cuda else CPU_TILE
        transposed = keys.T.contiguous()
        buffer = keys.new_empty(min(tile_rows, num_local) * min(tile_columns, len(keys)))
        for first in range(0, num_local, tile_rows):
            last = min(first + tile_rows, num_local)
            for start in range(first, len(keys), tile_columns):
                stop = min(start + tile_columns, len(keys))
                below = max(start, last)
                mirror = slice(below, max(below, min(stop, num_local)))
                tile = Tile(slice(first, last), slice(start, stop), mirror)
                scores = buffer[: (last - first) * (stop - start)].view(last - first, stop - start)
                rows, columns = keys[tile.rows], transposed[:, tile.columns]
                torch.addmm(scores, rows, columns, beta=0, alpha=1 / self.temperature, out=scores)
                if key_labels is not None:
                    same = key_labels[tile.rows, None] == key_labels[tile.columns]
                    scores.masked_fill_(same, -torch.inf)
                if start < last:
                    scores.diagonal(first - start).fill_(self_score)
                yield tile, scores

    def _plain_exp_is_safe(self, keys: Tensor) -> bool:
        """Return whether no score can leave the range; False also where a key is not finite."""
        if len(keys) == 0:
            return True
        largest = keys.square().sum(1).max().item() / self.temperature
        return largest <= PLAIN_EXP_LIMIT[keys.dtype]


def _mirrored(values: Tensor, tile: Tile) -> Tensor:
    return values[:, tile.mirror.start - tile.columns.start : tile.mirror.stop - tile.columns.start]


def _add_weighted(result: Tensor, weights: Tensor, keys: Tensor, tile: Tile) -> None:
    result[tile.rows].addmm_(weights, keys[tile.columns])
    if tile.mirror.start < tile.mirror.stop:
        result[tile.mirror].addmm_(_mirrored(weights, tile).T, keys[tile.rows])


def _key_sets(ids: Tensor, num_local: int, bank_of: Callable[[int], Tensor]) -> list[KeySet]:
    """Return the anchors of each id that has local ones, with the bank entries that they meet."""
    num_ids = int(ids.max()) + 1 if len(ids) else 0
    sizes = torch.bincount(ids, minlength=num_ids).tolist()
    members = torch.split(torch.argsort(ids, stable=True), sizes)
    num_locals = torch.bincount(ids[:num_local], minlength=num_ids).tolist()
    return [
        KeySet(anchors[:num], torch.cat([anchors, bank_of(index)]), anchors, num)
        for index, (anchors, num) in enumerate(zip(members, num_locals, strict=True))
        if num
    ]
