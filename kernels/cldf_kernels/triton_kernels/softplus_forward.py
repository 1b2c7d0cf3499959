"""Sums of softplus and sigmoid over the positives, which meet pair by pair (negatives="other")."""

import triton
import triton.language as tl

from cldf_kernels.triton_kernels.tiles import (
    full_tile,
    load_block,
    load_rows,
    log2_above_one,
    num_full_tiles,
    num_partial_tiles,
    partial_tile,
    product,
    reciprocal,
)


@triton.jit
def add_tile(
    queries,
    keys,
    query_negative_lse,
    start,
    stop,
    self_columns,
    losses,
    sigmoids,
    FEATURES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return both sums after one more tile of keys."""
    columns = start + tl.arange(0, BLOCK_KEYS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    gaps = query_negative_lse[:, None] - product(queries, tl.trans(tile), None, PRECISION)
    small = tl.math.exp2(-tl.abs(gaps))
    loss = tl.maximum(gaps, 0.0) + log2_above_one(1.0 + small)
    sigmoid = tl.where(gaps >= 0, 1.0, small) * reciprocal(1.0 + small)
    if MASKED:
        visited = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        loss = tl.where(visited, loss, 0.0)
        sigmoid = tl.where(visited, sigmoid, 0.0)
    return losses + tl.sum(loss, 1), sigmoids + tl.sum(sigmoid, 1)


@triton.jit
def softplus_forward_kernel(
    queries,
    keys,
    blocks,
    query_negative_lse,
    loss_sums,
    sigmoid_sums,
    FEATURES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_j log2(1 + 2^(b_i - s_ij)) and sum_j 1 / (1 + 2^(s_ij - b_i)), s_ij = q_i . k_j."""
    (
        query_start,
        query_stop,
        left,
        left_stop,
        right,
        right_stop,
        middle,
        middle_stop,
        first_result,
    ) = load_block(blocks)
    offsets = tl.arange(0, BLOCK_QUERIES)
    rows = tl.minimum(query_start + offsets, query_stop - 1)  # the last one fills the block
    own = load_rows(queries, rows, query_stop, FEATURES, False)
    own_negative_lse = tl.load(query_negative_lse + rows)
    self_columns = rows - query_start + tl.where(middle_stop > middle, middle, -BLOCK_QUERIES)
    losses = tl.zeros([BLOCK_QUERIES], tl.float32)
    sigmoids = tl.zeros([BLOCK_QUERIES], tl.float32)
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, BLOCK_KEYS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, BLOCK_KEYS)
        losses, sigmoids = add_tile(
            own, keys, own_negative_lse, start, start + BLOCK_KEYS, self_columns, losses, sigmoids,
            FEATURES, BLOCK_KEYS, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS
        )
        losses, sigmoids = add_tile(
            own, keys, own_negative_lse, start, stop, self_columns, losses, sigmoids,
            FEATURES, BLOCK_KEYS, True, PRECISION,
        )  # fmt: skip
    written = offsets < query_stop - query_start
    tl.store(loss_sums + first_result + offsets, losses, mask=written)
    tl.store(sigmoid_sums + first_result + offsets, sigmoids, mask=written)
