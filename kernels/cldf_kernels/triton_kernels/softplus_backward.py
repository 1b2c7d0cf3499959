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
    query_coefficients,
    query_negative_lse,
    key_coefficients,
    key_negative_lse,
    start,
    stop,
    self_columns,
    result,
    first_feature,
    FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `result` after one more tile of keys."""
    columns = start + tl.arange(0, BLOCK_KEYS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    coefficients = load_values(key_coefficients, columns, stop, 0.0, MASKED)
    negative_lse = load_values(key_negative_lse, columns, stop, 0.0, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    weights = query_coefficients[:, None] * reciprocal(
        1.0 + tl.math.exp2(scores - query_negative_lse[:, None])
    )
    weights += coefficients[None, :] * reciprocal(
        1.0 + tl.math.exp2(scores - negative_lse[None, :])
    )
    if MASKED:
        visited = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
        weights = tl.where(visited, weights, 0.0)
    if BLOCK_FEATURES == FEATURES:
        values = tile
    else:
        values = load_part(keys + first_feature, columns, stop, FEATURES, BLOCK_FEATURES, MASKED)
    return product(as_operand(weights, tile, PRECISION), values, result, PRECISION)


@triton.jit
def softplus_backward_kernel(
    queries,
    keys,
    blocks,
    query_coefficients,
    query_negative_lse,
    key_coefficients,
    key_negative_lse,
    results,
    FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_j (u_i / (1 + 2^(s_ij - b_i)) + u_j / (1 + 2^(s_ij - b_j))) k_j.

    The coefficients are u.
    """
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
    own_coefficients = tl.load(query_coefficients + rows)
    own_negative_lse = tl.load(query_negative_lse + rows)
    self_columns = rows - query_start + tl.where(middle_stop > middle, middle, -BLOCK_QUERIES)
    result = tl.zeros([BLOCK_QUERIES, BLOCK_FEATURES], tl.float32)
    first_feature = tl.program_id(1) * BLOCK_FEATURES
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, BLOCK_KEYS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, BLOCK_KEYS)
        result = add_tile(
            own, keys, own_coefficients, own_negative_lse, key_coefficients, key_negative_lse,
            start, start + BLOCK_KEYS, self_columns, result, first_feature,
            FEATURES, BLOCK_FEATURES, BLOCK_KEYS, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS
        )
        result = add_tile(
            own, keys, own_coefficients, own_negative_lse, key_coefficients, key_negative_lse,
            start, stop, self_columns, result, first_feature,
            FEATURES, BLOCK_FEATURES, BLOCK_KEYS, True, PRECISION,
        )  # fmt: skip
    features = first_feature + tl.arange(0, BLOCK_FEATURES)
    written = offsets < query_stop - query_start
    addresses = results + (first_result + offsets)[:, None] * FEATURES + features[None, :]
    tl.store(addresses, result, mask=written[:, None])
