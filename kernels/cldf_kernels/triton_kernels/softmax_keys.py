"""Keys weighted by both softmaxes: the repulsion of the gradient, row by row, no atomics."""

import triton
import triton.language as tl

from cldf_kernels.triton_kernels.tiles import (
    as_operand,
    full_tile,
    load_block,
    load_part,
    load_rows,
    load_values,
    num_full_tiles,
    num_partial_tiles,
    partial_tile,
    product,
)


@triton.jit
def add_tile(
    queries,
    keys,
    row_shares,
    row_lse,
    key_shares,
    key_lse,
    start,
    stop,
    self_columns,
    result,
    first_feature,
    FEATURES: tl.constexpr,
    RESULT_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`result` after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    shares = load_values(key_shares, columns, stop, 0.0, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    if ONLINE:
        lse = load_values(key_lse, columns, stop, float("inf"), MASKED)
        if MASKED:
            met = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
            scores = tl.where(met, scores, float("-inf"))
        # no softmax weight exceeds 1, however large the scores and so their rounding errors are
        weights = row_shares[:, None] * tl.math.exp2(tl.minimum(scores - row_lse[:, None], 0.0))
        weights += shares[None, :] * tl.math.exp2(tl.minimum(scores - lse[None, :], 0.0))
    else:
        weights = tl.math.exp2(scores) * (row_shares[:, None] + shares[None, :])
        if MASKED:
            met = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
            weights = tl.where(met, weights, 0.0)
    if RESULT_FEATURES == FEATURES:
        values = tile
    else:
        values = load_part(keys + first_feature, columns, stop, FEATURES, RESULT_FEATURES, MASKED)
    return product(as_operand(weights, tile, PRECISION), values, result, PRECISION)


@triton.jit
def softmax_keys_kernel(
    queries,
    keys,
    blocks,
    row_shares,
    row_lse,
    key_shares,
    key_lse,
    results,
    FEATURES: tl.constexpr,
    RESULT_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """results[i] = sum_j (u_i 2^(s_ij - lse_i) + u_j 2^(s_ij - lse_j)) k_j, s_ij = q_i . k_j.

    The shares are u 2^-lse; if ONLINE they are u, and lse is read too.
    """
    (row_start, row_stop, left, left_stop, right, right_stop, middle, middle_stop, first_result) = (
        load_block(blocks)
    )
    numbers = tl.arange(0, ROWS)
    rows = tl.minimum(row_start + numbers, row_stop - 1)  # the last one fills the block
    own = load_rows(queries, rows, row_stop, FEATURES, False)
    shares = tl.load(row_shares + rows)
    lse = shares
    if ONLINE:
        lse = tl.load(row_lse + rows)
    self_columns = rows - row_start + tl.where(middle_stop > middle, middle, -ROWS)
    result = tl.zeros([ROWS, RESULT_FEATURES], tl.float32)
    first_feature = tl.program_id(1) * RESULT_FEATURES
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, COLUMNS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, COLUMNS)
        result = add_tile(
            own, keys, shares, lse, key_shares, key_lse, start, start + COLUMNS,
            self_columns, result, first_feature,
            FEATURES, RESULT_FEATURES, COLUMNS, ONLINE, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, COLUMNS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, COLUMNS
        )
        result = add_tile(
            own, keys, shares, lse, key_shares, key_lse, start, stop,
            self_columns, result, first_feature,
            FEATURES, RESULT_FEATURES, COLUMNS, ONLINE, True, PRECISION,
        )  # fmt: skip
    features = first_feature + tl.arange(0, RESULT_FEATURES)
    written = numbers < row_stop - row_start
    addresses = results + (first_result + numbers)[:, None] * FEATURES + features[None, :]
    tl.store(addresses, result, mask=written[:, None])
