"""Sums of exponentials over any keys: a program owns its block of queries, no atomics."""

import triton
import triton.language as tl

from cldf_kernels.triton_kernels.tiles import (
    full_tile,
    load_block,
    load_rows,
    num_full_tiles,
    num_partial_tiles,
    partial_tile,
    product,
)


@triton.jit
def add_tile(
    queries,
    keys,
    start,
    stop,
    self_columns,
    maxima,
    sums,
    FEATURES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the running maxima and sums after one more tile of keys."""
    columns = start + tl.arange(0, BLOCK_KEYS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    if MASKED:
        visited = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        scores = tl.where(visited, scores, float("-inf"))
    if ONLINE:
        higher = tl.maximum(maxima, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.math.exp2(maxima - shift)
        sums += tl.sum(tl.math.exp2(scores - shift[:, None]), 1)
        return higher, sums
    else:
        return maxima, sums + tl.sum(tl.math.exp2(scores), 1)


@triton.jit
def lse_forward_kernel(
    queries,
    keys,
    blocks,
    results,
    FEATURES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_j 2^(q_i . k_j) over the keys that query i visits, or its log2 if ONLINE."""
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
    self_columns = rows - query_start + tl.where(middle_stop > middle, middle, -BLOCK_QUERIES)
    maxima = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_QUERIES], tl.float32)
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, BLOCK_KEYS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, BLOCK_KEYS)
        maxima, sums = add_tile(
            own, keys, start, start + BLOCK_KEYS, self_columns, maxima, sums,
            FEATURES, BLOCK_KEYS, ONLINE, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS
        )
        maxima, sums = add_tile(
            own, keys, start, stop, self_columns, maxima, sums,
            FEATURES, BLOCK_KEYS, ONLINE, True, PRECISION,
        )  # fmt: skip
    if ONLINE:
        sums = maxima + tl.math.log2(
            tl.where(sums == 0, 1.0, sums)
        )  # -inf where no key was visited
    written = offsets < query_stop - query_start
    tl.store(results + first_result + offsets, sums, mask=written)
