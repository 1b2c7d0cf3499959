"""The N x N work in plain torch, one tile at a time: O(N D) memory.

`keys` always begins with the anchors: rows [0, num_anchors). Pairs of two anchors are visited once
and serve both of them (scores are symmetric); the keys behind them (other ranks, bank) serve as
columns only. No anchor meets itself.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# (rows, columns). CPU: a float32 tile stays in the level-2 cache. CUDA: a few launches, 64 MB.
CPU_TILE = (256, 1024)
CUDA_TILE = (2048, 8192)

# Largest |score| for which exp(score), its sums and their inverses need no shift.
PLAIN_EXP_LIMIT = {torch.float32: 40.0, torch.float64: 300.0}

SOFTPLUS_THRESHOLD = 50.0  # linear beyond; torch's own, 20, is off by 2e-9

NEVER = float("inf")  # the log-sum-exp of a row whose softmax weights shall all be 0


class Tile(NamedTuple):
    rows: slice
    columns: slice
    mirror: slice  # columns that are anchors below the row block: no other tile visits them


def log_sum_exp(
    keys: Tensor, num_anchors: int, temperature: float, key_labels: Tensor | None = None
) -> Tensor:
    """log sum_j exp(z_i . k_j / temperature) of each anchor, float64; `NEVER` if it meets no key.

    With `key_labels`, keys of the anchor's own label are left out.
    """
    if _plain_exp_is_safe(keys, temperature):
        sums = torch.zeros(num_anchors, dtype=torch.float64, device=keys.device)
        for tile, scores in _score_tiles(keys, num_anchors, temperature, key_labels=key_labels):
            scores.exp_()
            sums[tile.rows] += scores.sum(1)
            sums[tile.mirror] += _mirrored(scores, tile).sum(0)
        lse = sums.log()
    else:
        lse = torch.full((num_anchors,), -torch.inf, dtype=torch.float64, device=keys.device)
        for tile, scores in _score_tiles(keys, num_anchors, temperature, key_labels=key_labels):
            for part, values in ((tile.rows, scores), (tile.mirror, _mirrored(scores, tile).T)):
                lse[part] = torch.logaddexp(lse[part], values.logsumexp(1).double())
    return lse.masked_fill_(lse == -torch.inf, NEVER)


def softmax_weighted_keys(
    keys: Tensor,
    num_anchors: int,
    temperature: float,
    *,
    lse: Tensor,
    upstream: Tensor,
    key_labels: Tensor | None = None,
) -> Tensor:
    """sum_j (u_i exp(s_ij - lse_i) + u_j exp(s_ij - lse_j)) k_j of each anchor.

    `lse` (float64) and `upstream` have one value per key; keys that are no anchors anywhere have
    `NEVER` and 0. With `key_labels`, keys of the anchor's own label are left out.
    """
    plain = _plain_exp_is_safe(keys, temperature)
    share = (upstream * torch.exp(-lse)).to(keys.dtype)  # a_i
    lse, upstream = lse.to(keys.dtype), upstream.to(keys.dtype)
    result = torch.zeros_like(keys[:num_anchors])
    for tile, scores in _score_tiles(keys, num_anchors, temperature, key_labels=key_labels):
        rows, columns = tile.rows, tile.columns
        if plain:
            weights = scores.exp_().mul_(share[rows, None] + share[columns])
        else:
            # no softmax weight exceeds 1, however large the scores and so their rounding errors are
            weights = (scores - lse[rows, None]).clamp_(max=0).exp_().mul_(upstream[rows, None])
            weights += scores.sub_(lse[columns]).clamp_(max=0).exp_().mul_(upstream[columns])
        _add_weighted(result, weights, keys, tile)
    return result


def positive_terms(
    keys: Tensor, num_anchors: int, temperature: float, negative_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over j of softplus(b_i - s_ij) and of sigmoid(b_i - s_ij), float64; one class only.

    `negative_lse` holds b, one finite value per key.
    """
    losses = torch.zeros(num_anchors, dtype=torch.float64, device=keys.device)
    pulls = torch.zeros_like(losses)
    bound = negative_lse.to(keys.dtype)
    for tile, scores in _score_tiles(keys, num_anchors, temperature, self_score=torch.inf):
        for part, values in ((tile.rows, scores), (tile.mirror, _mirrored(scores, tile).T)):
            gaps = bound[part, None] - values
            losses[part] += softplus(gaps, threshold=SOFTPLUS_THRESHOLD).sum(1)
            pulls[part] += gaps.sigmoid_().sum(1)
    return losses, pulls


def sigmoid_weighted_keys(
    keys: Tensor, num_anchors: int, temperature: float, *, negative_lse: Tensor, upstream: Tensor
) -> Tensor:
    """sum_j (u_i sigmoid(b_i - s_ij) + u_j sigmoid(b_j - s_ij)) k_j of each anchor; one class only.

    `negative_lse` holds b; it and `upstream` have one finite value per key.
    """
    bound, upstream = negative_lse.to(keys.dtype), upstream.to(keys.dtype)
    result = torch.zeros_like(keys[:num_anchors])
    for tile, scores in _score_tiles(keys, num_anchors, temperature, self_score=torch.inf):
        rows, columns = tile.rows, tile.columns
        weights = (bound[rows, None] - scores).sigmoid_().mul_(upstream[rows, None])
        weights += (bound[columns] - scores).sigmoid_().mul_(upstream[columns])
        _add_weighted(result, weights, keys, tile)
    return result


def _score_tiles(
    keys: Tensor,
    num_anchors: int,
    temperature: float,
    *,
    self_score: float = -torch.inf,
    key_labels: Tensor | None = None,
) -> Iterator[tuple[Tile, Tensor]]:
    """Scores of each tile in a buffer that the next tile reuses; an anchor with itself scores
    `self_score`, and with `key_labels` every pair of one label scores -inf."""
    tile_rows, tile_columns = CUDA_TILE if keys.is_cuda else CPU_TILE
    transposed = keys.T.contiguous()
    buffer = keys.new_empty(min(tile_rows, num_anchors) * min(tile_columns, len(keys)))
    for first in range(0, num_anchors, tile_rows):
        last = min(first + tile_rows, num_anchors)
        for start in range(first, len(keys), tile_columns):
            stop = min(start + tile_columns, len(keys))
            below = max(start, last)
            mirror = slice(below, max(below, min(stop, num_anchors)))
            tile = Tile(slice(first, last), slice(start, stop), mirror)
            scores = buffer[: (last - first) * (stop - start)].view(last - first, stop - start)
            rows, columns = keys[tile.rows], transposed[:, tile.columns]
            torch.addmm(scores, rows, columns, beta=0, alpha=1 / temperature, out=scores)
            if key_labels is not None:
                same = key_labels[tile.rows, None] == key_labels[tile.columns]
                scores.masked_fill_(same, -torch.inf)
            if start < last:
                scores.diagonal(first - start).fill_(self_score)
            yield tile, scores


def _mirrored(values: Tensor, tile: Tile) -> Tensor:
    return values[:, tile.mirror.start - tile.columns.start : tile.mirror.stop - tile.columns.start]


def _add_weighted(result: Tensor, weights: Tensor, keys: Tensor, tile: Tile) -> None:
    result[tile.rows].addmm_(weights, keys[tile.columns])
    if tile.mirror.start < tile.mirror.stop:
        result[tile.mirror].addmm_(_mirrored(weights, tile).T, keys[tile.rows])


def _plain_exp_is_safe(keys: Tensor, temperature: float) -> bool:
    """Whether no score can leave the range; False also where a key is not finite."""
    if len(keys) == 0:
        return True
    largest = keys.square().sum(1).max().item() / temperature
    return largest <= PLAIN_EXP_LIMIT[keys.dtype]
