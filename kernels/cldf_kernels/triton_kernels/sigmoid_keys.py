"""Keys weighted by both sigmoids: the attraction of positives that meet pair by pair."""

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
    reciprocal,
)


@triton.jit
def add_tile(
    queries,
    keys,
    row_shares,
    row_bounds,
    key_shares,
    key_bounds,
    start,
    stop,
    self_columns,
    result,
    first_feature,
    FEATURES: tl.constexpr,
    RESULT_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`result` after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    shares = load_values(key_shares, columns, stop, 0.0, MASKED)
    bounds = load_values(key_bounds, columns, stop, 0.0, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    weights = row_shares[:, None] * reciprocal(1.0 + tl.math.exp2(scores - row_bounds[:, None]))
    weights += shares[None, :] * reciprocal(1.0 + tl.math.exp2(scores - bounds[None, :]))
    if MASKED:
        met = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        weights = tl.where(met, weights, 0.0)
    if RESULT_FEATURES == FEATURES:
        values = tile
    else:
        values = load_part(keys + first_feature, columns, stop, FEATURES, RESULT_FEATURES, MASKED)
    return product(as_operand(weights, tile, PRECISION), values, result, PRECISION)


@triton.jit
def sigmoid_keys_kernel(
    queries,
    keys,
    blocks,
    row_shares,
    row_bounds,
    key_shares,
    key_bounds,
    results,
    FEATURES: tl.constexpr,
    RESULT_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """results[i] = sum_j (u_i / (1 + 2^(s_ij - b_i)) + u_j / (1 + 2^(s_ij - b_j))) k_j."""
    (row_start, row_stop, left, left_stop, right, right_stop, middle, middle_stop, first_result) = (
        load_block(blocks)
    )
    numbers = tl.arange(0, ROWS)
    rows = tl.minimum(row_start + numbers, row_stop - 1)  # the last one fills the block
    own = load_rows(queries, rows, row_stop, FEATURES, False)
    shares = tl.load(row_shares + rows)
    bounds = tl.load(row_bounds + rows)
    self_columns = rows - row_start + tl.where(middle_stop > middle, middle, -ROWS)
    result = tl.zeros([ROWS, RESULT_FEATURES], tl.float32)
    first_feature = tl.program_id(1) * RESULT_FEATURES
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, COLUMNS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, COLUMNS)
        result = add_tile(
            own, keys, shares, bounds, key_shares, key_bounds, start, start + COLUMNS,
            self_columns, result, first_feature,
            FEATURES, RESULT_FEATURES, COLUMNS, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, COLUMNS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, COLUMNS
        )
        result = add_tile(
            own, keys, shares, bounds, key_shares, key_bounds, start, stop,
            self_columns, result, first_feature,
            FEATURES, RESULT_FEATURES, COLUMNS, True, PRECISION,
        )  # fmt: skip
    features = first_feature + tl.arange(0, RESULT_FEATURES)
    written = numbers < row_stop - row_start
    addresses = results + (first_result + numbers)[:, None] * FEATURES + features[None, :]
    tl.store(addresses, result, mask=written[:, None])
