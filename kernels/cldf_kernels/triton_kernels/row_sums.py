"""Row sums of exponentials: one program owns a block of queries, no atomics, any keys."""

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
    COLUMNS: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running maxima and sums after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    if MASKED:
        met = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        scores = tl.where(met, scores, float("-inf"))
    if ONLINE:
        higher = tl.maximum(maxima, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.math.exp2(maxima - shift)
        sums += tl.sum(tl.math.exp2(scores - shift[:, None]), 1)
        return higher, sums
    else:
        return maxima, sums + tl.sum(tl.math.exp2(scores), 1)


@triton.jit
def row_sums_kernel(
    queries,
    keys,
    blocks,
    results,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """results[i] = sum_j 2^(q_i . k_j) over the keys that query i meets, or its log2 if ONLINE."""
    (row_start, row_stop, left, left_stop, right, right_stop, middle, middle_stop, first_result) = (
        load_block(blocks)
    )
    numbers = tl.arange(0, ROWS)
    rows = tl.minimum(row_start + numbers, row_stop - 1)  # the last one fills the block
    own = load_rows(queries, rows, row_stop, FEATURES, False)
    self_columns = rows - row_start + tl.where(middle_stop > middle, middle, -ROWS)
    maxima = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, COLUMNS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, COLUMNS)
        maxima, sums = add_tile(
            own, keys, start, start + COLUMNS, self_columns, maxima, sums,
            FEATURES, COLUMNS, ONLINE, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, COLUMNS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, COLUMNS
        )
        maxima, sums = add_tile(
            own, keys, start, stop, self_columns, maxima, sums,
            FEATURES, COLUMNS, ONLINE, True, PRECISION,
        )  # fmt: skip
    if ONLINE:
        sums = maxima + tl.math.log2(tl.where(sums == 0, 1.0, sums))  # -inf where no key was met
    written = numbers < row_stop - row_start
    tl.store(results + first_result + numbers, sums, mask=written)
