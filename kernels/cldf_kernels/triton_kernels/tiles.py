"""Steps that all kernels share: load rows, take scores, walk the keys that a block visits.

A *block* is a run of consecutive queries, at most BLOCK_QUERIES of them, and the ranges of keys
that they visit: `BLOCK_FIELDS` int32 numbers. Two ranges lie left and right of a middle, which
holds the queries themselves: query r of the block is key `self_start + r`. No query visits itself.
Several blocks may share their queries and divide the keys; each then has results of its own.
"""

import triton
import triton.language as tl
from triton import knobs

BLOCK_FIELDS = tl.constexpr(9)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """Return accumulator + a b in float32; None stands for zeros.

    The interpreter of Triton 3.7 multiplies the bit patterns of bfloat16: there both sides go
    through float32, in which products of halves are exact.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def log2_above_one(x):
    """Return log2 x for 1 <= x within 2^-22, by one instruction; the interpreter knows none."""
    if INTERPRETED:
        return tl.math.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """Return 1 / x for 1 <= x, within one unit in the last place; 0 for infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def as_operand(weights, tile, PRECISION: tl.constexpr):
    """Return weights as a product with `tile` takes them; tf32 truncates: round to nearest here."""
    if PRECISION == "tf32":
        bits = weights.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return weights.to(tile.dtype)


@triton.jit
def load_rows(matrix, rows, stop, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    """Return rows of a contiguous matrix of FEATURES columns; zeros from row `stop` on."""
    return load_part(matrix, rows, stop, FEATURES, FEATURES, MASKED)


@triton.jit
def load_part(matrix, rows, stop, FEATURES: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr):
    """Return the first PART columns of rows of a contiguous matrix of FEATURES columns."""
    addresses = matrix + rows[:, None] * FEATURES + tl.arange(0, PART)[None, :]
    if MASKED:
        return tl.load(addresses, mask=rows[:, None] < stop, other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def load_values(values, offsets, stop, OTHER: tl.constexpr, MASKED: tl.constexpr):
    """Return one value for each offset; OTHER from `stop` on."""
    if MASKED:
        return tl.load(values + offsets, mask=offsets < stop, other=OTHER)
    else:
        return tl.load(values + offsets)


@triton.jit
def load_block(blocks):
    """Return the numbers of this program's block."""
    block = blocks + tl.program_id(0) * BLOCK_FIELDS
    return (
        tl.load(block),  # first query
        tl.load(block + 1),  # end of the queries
        tl.load(block + 2),  # left range of keys
        tl.load(block + 3),
        tl.load(block + 4),  # right range
        tl.load(block + 5),
        tl.load(block + 6),  # middle
        tl.load(block + 7),
        tl.load(block + 8),  # where the results of its queries begin
    )


@triton.jit
def full_tile(tile, left_start, num_left, right_start, BLOCK_KEYS: tl.constexpr):
    """Return the first key of the `tile`-th tile wholly in the left or the right range."""
    return tl.where(
        tile < num_left,
        left_start + tile * BLOCK_KEYS,
        right_start + (tile - num_left) * BLOCK_KEYS,
    )


@triton.jit
def num_full_tiles(left_start, left_stop, right_start, right_stop, BLOCK_KEYS: tl.constexpr):
    """Return how many tiles lie wholly in the left range, and wholly in the left or right one."""
    num_left = (left_stop - left_start) // BLOCK_KEYS
    return num_left, num_left + (right_stop - right_start) // BLOCK_KEYS


@triton.jit
def num_partial_tiles(
    left_start, left_stop, right_start, right_stop, self_start, self_stop, BLOCK_KEYS: tl.constexpr
):
    """Return how many tiles need masks: the middle, the rest of the left range, of the right."""
    rests = tl.where((left_stop - left_start) % BLOCK_KEYS > 0, 1, 0)
    rests += tl.where((right_stop - right_start) % BLOCK_KEYS > 0, 1, 0)
    return tl.cdiv(self_stop - self_start, BLOCK_KEYS) + rests


@triton.jit
def partial_tile(
    tile,
    left_start,
    left_stop,
    right_start,
    right_stop,
    self_start,
    self_stop,
    BLOCK_KEYS: tl.constexpr,
):
    """Return the first key of the `tile`-th tile that needs masks, and the end of its keys."""
    num_middle = tl.cdiv(self_stop - self_start, BLOCK_KEYS)
    left_rest = (left_stop - left_start) % BLOCK_KEYS
    right_rest = (right_stop - right_start) % BLOCK_KEYS
    in_middle = tile < num_middle
    in_left = (tile == num_middle) & (left_rest > 0)
    start = tl.where(in_left, left_stop - left_rest, right_stop - right_rest)
    stop = tl.where(in_left, left_stop, right_stop)
    start = tl.where(in_middle, self_start + tile * BLOCK_KEYS, start)
    return start, tl.where(in_middle, self_stop, stop)
