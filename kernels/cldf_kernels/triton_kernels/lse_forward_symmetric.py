"""Sums of exponentials where queries are the keys: each pair is visited once.

Scores are symmetric, so every exponential of a tile right of the diagonal serves its row and, by
an atomic addition, its column: half the work of `lse_forward`, in an order that varies.
"""

import triton
import triton.language as tl

from cldf_kernels.triton_kernels.tiles import load_rows, product


# the number of pixels changes from step to step: no compilation for numbers like 1 or 16
@triton.jit(do_not_specialize=["num_keys", "tiles_per_program"])
def lse_forward_symmetric_kernel(
    keys,
    sums,
    num_keys,
    tiles_per_program,
    FEATURES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add sum_{j != i} 2^(k_i . k_j) to sums, for `tiles_per_program` tiles of a block of queries.

    BLOCK_QUERIES is a multiple of BLOCK_KEYS.
    """
    tl.static_assert(BLOCK_QUERIES % BLOCK_KEYS == 0)
    query_start = tl.program_id(0) * BLOCK_QUERIES
    right = query_start + BLOCK_QUERIES  # the diagonal block is a square of its own
    first = tl.program_id(1) * tiles_per_program
    num_right = tl.cdiv(tl.maximum(num_keys - right, 0), BLOCK_KEYS)
    if (first < num_right) | (first == 0):
        rows = query_start + tl.arange(0, BLOCK_QUERIES)
        own = load_rows(keys, rows, num_keys, FEATURES, True)
        row_sums = tl.zeros([BLOCK_QUERIES], tl.float32)
        num_full = tl.maximum(num_keys - right, 0) // BLOCK_KEYS
        last = tl.minimum(first + tiles_per_program, num_right)
        for tile in range(first, tl.minimum(last, num_full)):
            columns = right + tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            other = load_rows(keys, columns, num_keys, FEATURES, False)
            weights = tl.math.exp2(product(own, tl.trans(other), None, PRECISION))
            row_sums += tl.sum(weights, 1)
            tl.atomic_add(sums + columns, tl.sum(weights, 0), sem="relaxed")
        num_diagonal = tl.where(first == 0, BLOCK_QUERIES // BLOCK_KEYS, 0)
        has_rest = tl.where((last == num_right) & (num_full < num_right), 1, 0)
        for tile in range(num_diagonal + has_rest):
            on_diagonal = tile < num_diagonal
            start = tl.where(
                on_diagonal, query_start + tile * BLOCK_KEYS, right + num_full * BLOCK_KEYS
            )
            columns = start + tl.arange(0, BLOCK_KEYS)
            other = load_rows(keys, columns, num_keys, FEATURES, True)
            weights = tl.math.exp2(product(own, tl.trans(other), None, PRECISION))
            visited = (columns[None, :] < num_keys) & (columns[None, :] != rows[:, None])
            weights = tl.where(visited, weights, 0.0)
            row_sums += tl.sum(weights, 1)
            if tile >= num_diagonal:
                tl.atomic_add(
                    sums + columns, tl.sum(weights, 0), mask=columns < num_keys, sem="relaxed"
                )
        tl.atomic_add(sums + rows, row_sums, mask=rows < num_keys, sem="relaxed")
