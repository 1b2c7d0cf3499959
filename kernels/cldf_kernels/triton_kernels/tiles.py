"""What every kernel does with a tile: load rows, take scores, walk the keys that a block meets.

A *block* is a run of consecutive queries, at most ROWS of them, and the ranges of keys that they
meet: `BLOCK_FIELDS` int32 numbers. Two ranges lie left and right of a middle, which holds the
queries themselves: query r of the block is key `self_start + r`. No query meets itself. Several
blocks may share their queries and divide the keys; each then has results of its own.
"""

import triton
import triton.language as tl
from triton import knobs

BLOCK_FIELDS = tl.constexpr(9)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in float32; None stands for zeros.

    The interpreter of Triton 3.7 multiplies the bit patterns of bfloat16: there both sides go
    through float32, in which products of halves are exact.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def log2_above_one(x):
    """log2 x for 1 <= x, within 2^-22: one instruction (the interpreter knows no assembler)."""
    if INTERPRETED:
        return tl.math.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x, within one unit in the last place; 0 for infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def as_operand(weights, tile, PRECISION: tl.constexpr):
    """Weights as a product with `tile` takes them; tf32 does not round to nearest by itself."""
    if PRECISION == "tf32":
        bits = weights.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return weights.to(tile.dtype)


@triton.jit
def load_rows(matrix, rows, stop, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a contiguous matrix of FEATURES columns; zeros from row `stop` on."""
    return load_part(matrix, rows, stop, FEATURES, FEATURES, MASKED)


@triton.jit
def load_part(matrix, rows, stop, FEATURES: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr):
    """PART columns of rows of a contiguous matrix of FEATURES columns, from where it points on."""
    addresses = matrix + rows[:, None] * FEATURES + tl.arange(0, PART)[None, :]
    if MASKED:
        return tl.load(addresses, mask=rows[:, None] < stop, other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def load_values(values, numbers, stop, OTHER: tl.constexpr, MASKED: tl.constexpr):
    """One value for each number; OTHER from `stop` on."""
    if MASKED:
        return tl.load(values + numbers, mask=numbers < stop, other=OTHER)
    else:
        return tl.load(values + numbers)


@triton.jit
def load_block(blocks):
    """The numbers of this program's block."""
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
def full_tile(tile, left_start, num_left, right_start, COLUMNS: tl.constexpr):
    """First key of the `tile`-th tile that lies wholly in the left or the right range."""
    return tl.where(
        tile < num_left, left_start + tile * COLUMNS, right_start + (tile - num_left) * COLUMNS
    )


@triton.jit
def num_full_tiles(left_start, left_stop, right_start, right_stop, COLUMNS: tl.constexpr):
    """Tiles wholly in the left range; wholly in the left or the right one."""
    num_left = (left_stop - left_start) // COLUMNS
    return num_left, num_left + (right_stop - right_start) // COLUMNS


@triton.jit
def num_partial_tiles(
    left_start, left_stop, right_start, right_stop, self_start, self_stop, COLUMNS: tl.constexpr
):
    """Tiles that need masks: the middle, then the rest of the left range, then of the right."""
    rests = tl.where((left_stop - left_start) % COLUMNS > 0, 1, 0)
    rests += tl.where((right_stop - right_start) % COLUMNS > 0, 1, 0)
    return tl.cdiv(self_stop - self_start, COLUMNS) + rests


@triton.jit
def partial_tile(
    tile,
    left_start,
    left_stop,
    right_start,
    right_stop,
    self_start,
    self_stop,
    COLUMNS: tl.constexpr,
):
    """First key of the `tile`-th tile that needs masks, and the end of its keys."""
    num_middle = tl.cdiv(self_stop - self_start, COLUMNS)
    left_rest = (left_stop - left_start) % COLUMNS
    right_rest = (right_stop - right_start) % COLUMNS
    in_middle = tile < num_middle
    in_left = (tile == num_middle) & (left_rest > 0)
    start = tl.where(in_left, left_stop - left_rest, right_stop - right_rest)
    stop = tl.where(in_left, left_stop, right_stop)
    start = tl.where(in_middle, self_start + tile * COLUMNS, start)
    return start, tl.where(in_middle, self_stop, stop)
