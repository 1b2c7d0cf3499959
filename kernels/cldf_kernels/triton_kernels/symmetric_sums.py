"""Row sums of exponentials where queries are the keys: each pair is visited once.

Scores are symmetric, so every exponential of a tile right of the diagonal serves its row and, by
an atomic addition, its column: half the work of `row_sums`, in an order that varies.
"""

import triton
import triton.language as tl

from cldf_kernels.triton_kernels.tiles import load_rows, product


# the number of pixels changes from step to step: no compilation for numbers like 1 or 16
@triton.jit(do_not_specialize=["num_keys", "tiles_per_program"])
def symmetric_sums_kernel(
    keys,
    sums,
    num_keys,
    tiles_per_program,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[i] += sum_{j != i} 2^(k_i . k_j), for `tiles_per_program` tiles of one block of rows.

    ROWS is a multiple of COLUMNS.
    """
    tl.static_assert(ROWS % COLUMNS == 0)
    row_start = tl.program_id(0) * ROWS
    right = row_start + ROWS  # the diagonal block is a square of its own
    first = tl.program_id(1) * tiles_per_program
    num_right = tl.cdiv(tl.maximum(num_keys - right, 0), COLUMNS)
    if (first < num_right) | (first == 0):
        rows = row_start + tl.arange(0, ROWS)
        own = load_rows(keys, rows, num_keys, FEATURES, True)
        row_sums = tl.zeros([ROWS], tl.float32)
        num_full = tl.maximum(num_keys - right, 0) // COLUMNS
        last = tl.minimum(first + tiles_per_program, num_right)
        for tile in range(first, tl.minimum(last, num_full)):
            columns = right + tile * COLUMNS + tl.arange(0, COLUMNS)
            other = load_rows(keys, columns, num_keys, FEATURES, False)
            weights = tl.math.exp2(product(own, tl.trans(other), None, PRECISION))
            row_sums += tl.sum(weights, 1)
            tl.atomic_add(sums + columns, tl.sum(weights, 0), sem="relaxed")
        num_diagonal = tl.where(first == 0, ROWS // COLUMNS, 0)
        has_rest = tl.where((last == num_right) & (num_full < num_right), 1, 0)
        for tile in range(num_diagonal + has_rest):
            on_diagonal = tile < num_diagonal
            start = tl.where(on_diagonal, row_start + tile * COLUMNS, right + num_full * COLUMNS)
            columns = start + tl.arange(0, COLUMNS)
            other = load_rows(keys, columns, num_keys, FEATURES, True)
            weights = tl.math.exp2(product(own, tl.trans(other), None, PRECISION))
            met = (columns[None, :] < num_keys) & (columns[None, :] != rows[:, None])
            weights = tl.where(met, weights, 0.0)
            row_sums += tl.sum(weights, 1)
            if tile >= num_diagonal:
                tl.atomic_add(
                    sums + columns, tl.sum(weights, 0), mask=columns < num_keys, sem="relaxed"
                )
        tl.atomic_add(sums + rows, row_sums, mask=rows < num_keys, sem="relaxed")
