"""`segment_sum`: sums of the rows that have the same id, without a wait for the device."""

import functools

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

MAX_MATRIX_SEGMENTS = 64  # up to here, sums on a GPU are the product with a 0/1 matrix
GPU_CHUNK, CPU_CHUNK = 65536, 1024  # rows that are taken to float64 at a time
SPREAD, SPREAD_SUMS = 512, 16384  # places of one sum, and of all of them, in deterministic sums


def segment_sum(
    rows: Float[Tensor, "rows features"],
    ids: Int64[Tensor, " rows"],
    num_ids: int,
    *,
    deterministic: bool,
    weights: Float64[Tensor, " rows"] | None = None,
) -> Float[Tensor, "{num_ids} features"]:
    """Return the sum of the rows of each id, each times its weight; sums are taken in float64.

    Args:
        rows: what is added.
        ids: the segment of each row, from 0 to `num_ids` - 1.
        num_ids: the number of segments; one may be empty.
        deterministic: on a GPU, add in an order that never changes.
        weights: one factor per row; None: 1.
    """
    if rows.is_cuda and deterministic:
        sums = _spread_sums(rows, ids, num_ids, weights)
    elif rows.is_cuda and num_ids <= MAX_MATRIX_SEGMENTS:
        sums = _matrix_sums(rows, ids, num_ids, weights)
    else:
        sums = torch.zeros(num_ids, rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in _chunks(rows):
            sums.index_add_(0, ids[part], _weighted(rows, weights, part))
    return sums.to(rows.dtype)


def segment_count(ids: Int64[Tensor, " rows"], num_ids: int) -> Int64[Tensor, " {num_ids}"]:
    """Return the number of rows of each id; unlike bincount it does not wait for the device."""
    if ids.is_cuda and num_ids <= MAX_MATRIX_SEGMENTS:
        return (ids == torch.arange(num_ids, device=ids.device)[:, None]).sum(1)
    counts = torch.zeros(num_ids, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def _spread_sums(rows: Tensor, ids: Tensor, num_ids: int, weights: Tensor | None) -> Tensor:
    """Sum in an order that never changes: index_add_ adds atomically on a GPU.

    index_put_ sorts, and adds what belongs to one place one after the other: so each sum is spread
    over many places.
    """
    spread = min(SPREAD, max(SPREAD_SUMS // max(num_ids, 1), 1))
    shape = (num_ids * spread, rows.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    for part in _chunks(rows):
        turns = torch.arange(len(ids[part]), device=rows.device) % spread
        places = ids[part] * spread + turns
        sums.index_put_((places,), _weighted(rows, weights, part), accumulate=True)
    return sums.view(num_ids, spread, shape[1]).sum(1)


def _matrix_sums(rows: Tensor, ids: Tensor, num_ids: int, weights: Tensor | None) -> Tensor:
    """Sum by the product with a 0/1 matrix: on a GPU, atomics would meet at few addresses."""
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
