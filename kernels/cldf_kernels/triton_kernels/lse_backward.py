"""Keys weighted by both softmaxes: the repulsion of the gradient; a program owns its queries."""

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
    query_coefficients,
    query_lse,
    key_coefficients,
    key_lse,
    start,
    stop,
    self_columns,
    result,
    first_feature,
    FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `result` after one more tile of keys."""
    columns = start + tl.arange(0, BLOCK_KEYS)
    tile = load_rows(keys, columns, stop, FEATURES, MASKED)
    coefficients = load_values(key_coefficients, columns, stop, 0.0, MASKED)
    scores = product(queries, tl.trans(tile), None, PRECISION)
    if ONLINE:
        lse = load_values(key_lse, columns, stop, float("inf"), MASKED)
        if MASKED:
            visited = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
            scores = tl.where(visited, scores, float("-inf"))
        # no softmax weight exceeds 1, however large the scores and so their rounding errors are
        weights = query_coefficients[:, None] * tl.math.exp2(
            tl.minimum(scores - query_lse[:, None], 0.0)
        )
        weights += coefficients[None, :] * tl.math.exp2(tl.minimum(scores - lse[None, :], 0.0))
    else:
        weights = tl.math.exp2(scores) * (query_coefficients[:, None] + coefficients[None, :])
        if MASKED:
            visited = (columns[None, :] < stop) & (columns[None, :] != self_columns[:, None])
            weights = tl.where(visited, weights, 0.0)
    if BLOCK_FEATURES == FEATURES:
        values = tile
    else:
        values = load_part(keys + first_feature, columns, stop, FEATURES, BLOCK_FEATURES, MASKED)
    return product(as_operand(weights, tile, PRECISION), values, result, PRECISION)


@triton.jit
def lse_backward_kernel(
    queries,
    keys,
    blocks,
    query_coefficients,
    query_lse,
    key_coefficients,
    key_lse,
    results,
    FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_j (u_i 2^(s_ij - lse_i) + u_j 2^(s_ij - lse_j)) k_j, s_ij = q_i . k_j.

    The coefficients are u 2^-lse; if ONLINE they are u, and lse is read too.
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
    own_lse = own_coefficients
    if ONLINE:
        own_lse = tl.load(query_lse + rows)
    self_columns = rows - query_start + tl.where(middle_stop > middle, middle, -BLOCK_QUERIES)
    result = tl.zeros([BLOCK_QUERIES, BLOCK_FEATURES], tl.float32)
    first_feature = tl.program_id(1) * BLOCK_FEATURES
    num_left, num_full = num_full_tiles(left, left_stop, right, right_stop, BLOCK_KEYS)
    for tile in range(num_full):
        start = full_tile(tile, left, num_left, right, BLOCK_KEYS)
        result = add_tile(
            own, keys, own_coefficients, own_lse, key_coefficients, key_lse,
            start, start + BLOCK_KEYS, self_columns, result, first_feature,
            FEATURES, BLOCK_FEATURES, BLOCK_KEYS, ONLINE, False, PRECISION,
        )  # fmt: skip
    for tile in range(
        num_partial_tiles(left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS),
    ):
        start, stop = partial_tile(
            tile, left, left_stop, right, right_stop, middle, middle_stop, BLOCK_KEYS
        )
        result = add_tile(
            own, keys, own_coefficients, own_lse, key_coefficients, key_lse,
            start, stop, self_columns, result, first_feature,
            FEATURES, BLOCK_FEATURES, BLOCK_KEYS, ONLINE, True, PRECISION,
        )  # fmt: skip
    features = first_feature + tl.arange(0, BLOCK_FEATURES)
    written = offsets < query_stop - query_start
    addresses = results + (first_result + offsets)[:, None] * FEATURES + features[None, :]
    tl.store(addresses, result, mask=written[:, None])
