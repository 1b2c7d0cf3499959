"""Loss and pull of positives that meet pair by pair (negatives="other"), row by row."""

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
    bounds,
    start,
    stop,
    self_columns,
    losses,
    pulls,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both sums after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    gaps = bounds[:, None] - product(queries, tl.trans(tile), None, PRECISION)
    small = tl.math.exp2(-tl.abs(gaps))
    loss = tl.maximum(gaps, 0.0) + log2_above_one(1.0 + small)
    pull = tl.where(gaps >= 0, 1.0, small) * reciprocal(1.0 + small)
    if MASKED:
        met = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        loss = tl.where(met, loss, 0.0)
        pull = tl.where(met, pull, 0.0)
    return losses + tl.sum(loss, 1), pulls + tl.sum(pull, 1)


@triton.jit
def positive_terms_kernel(
    queries,
    keys,
    blocks,
    row_bounds,
    loss_sums,
    pull_sums,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_j log2(1 + 2^(b_i - s_ij)) and sum_j 1 / (1 + 2^(s_ij - b_i)), s_ij = q_i . k_j."""
    (row_start, row_stop, left, left_stop, right, right_stop, middle, middle_stop, first_result) = (
        load_block(blocks)
    )
    numbers = tl.arange(0, ROWS)
    rows = tl.minimum(row_start + numbers, row_stop - 1)  # the last one fills the block
    own = load_rows(queries, rows, row_stop, FEATURES, False)
    bounds = tl.load(row_bounds + rows)
    self_columns = rows - row_start + tl.where(middle_stop > middle, middle, -ROWS)
    losses = tl.zeros([ROWS], tl.float32)
    pulls = tl.zeros([ROWS], tl.float32)
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, COLUMNS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, COLUMNS)
        losses, pulls = add_tile(
            own, keys, bounds, start, start + COLUMNS, self_columns, losses, pulls,
            FEATURES, COLUMNS, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, COLUMNS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, COLUMNS
        )
        losses, pulls = add_tile(
            own, keys, bounds, start, stop, self_columns, losses, pulls,
            FEATURES, COLUMNS, True, PRECISION,
        )  # fmt: skip
    written = numbers < row_stop - row_start
    tl.store(loss_sums + first_result + numbers, losses, mask=written)
    tl.store(pull_sums + first_result + numbers, pulls, mask=written)
