"""Tile shapes by architecture, precision and features: a plain table, so that runs repeat.

Chosen by compiling ahead of time (kernels/compiled): no spilled register, shared memory within
the architecture's limit, few instructions per exponential. Not yet tuned on a device.
"""

from typing import NamedTuple

FEATURES = (32, 64, 128, 256)  # narrower embeddings are padded with zeros
ARCHITECTURES = (80, 90, 100)  # others from 80 on take the shapes of 80: they fit everywhere
# Where a tile's column sums cost less than its exponentials. On 100 a thread holds one row of the
# scores: there sums over columns cross all threads, and visiting each pair twice costs no more.
SYMMETRIC_FORWARD = (80, 90)


class Shape(NamedTuple):
    """One program's tile: queries, keys, features of the result; warps, pipeline stages."""

    rows: int
    columns: int
    result_features: int
    num_warps: int
    num_stages: int


HALF = ("fp16", "bf16")

Sums = tuple[int, int, int, int]
Keys = tuple[int, int, int, int, int]

# rows, columns, warps, stages, for each of FEATURES
SUMS: dict[int, dict[str, tuple[Sums, ...]]] = {
    80: {
        "half": ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        "tf32": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        "fp32": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    },
    90: {
        "half": ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2)),
        "tf32": ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        "fp32": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    },
    100: {
        "half": ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)),
        "tf32": ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 2)),
        "fp32": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1), (16, 32, 4, 1)),
    },
}  # fmt: skip

# rows, columns, features of the result, warps, stages, for each of FEATURES
KEYS: dict[int, dict[str, tuple[Keys, ...]]] = {
    80: {
        "half": ((128, 64, 32, 8, 3), (128, 64, 64, 8, 2),
                 (64, 64, 128, 4, 2), (64, 64, 256, 4, 2)),
        "tf32": ((64, 32, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 128, 8, 2), (32, 32, 128, 4, 1)),
        "fp32": ((32, 32, 32, 4, 2), (32, 32, 64, 4, 1), (32, 32, 64, 8, 1), (32, 32, 64, 8, 2)),
    },
    90: {
        "half": ((128, 64, 32, 4, 3), (128, 64, 64, 4, 3),
                 (128, 64, 128, 8, 2), (128, 64, 256, 8, 2)),
        "tf32": ((64, 64, 32, 4, 2), (64, 64, 64, 4, 2),
                 (128, 64, 128, 8, 2), (128, 32, 128, 8, 2)),
        "fp32": ((32, 32, 32, 4, 2), (32, 32, 64, 4, 2), (32, 32, 64, 8, 1), (32, 32, 64, 8, 2)),
    },
    100: {
        "half": ((128, 64, 32, 8, 3), (128, 64, 64, 8, 3),
                 (128, 64, 128, 8, 3), (128, 64, 256, 8, 3)),
        "tf32": ((128, 64, 32, 8, 3), (128, 64, 64, 8, 3),
                 (128, 64, 128, 8, 3), (128, 32, 128, 8, 2)),
        "fp32": ((32, 32, 32, 4, 2), (32, 32, 64, 4, 2), (32, 32, 64, 8, 1), (32, 32, 64, 8, 2)),
    },
}  # fmt: skip


def has_symmetric_forward(architecture: int) -> bool:
    return _table_of(architecture) in SYMMETRIC_FORWARD


def padded_features(num_features: int) -> int:
    """The smallest supported number of features that holds `num_features`."""
    return next(width for width in FEATURES if num_features <= width)


def sums_shape(architecture: int, precision: str, features: int) -> Shape:
    """For the kernels whose result is one number a query."""
    row = SUMS[_table_of(architecture)][_row_of(precision)]
    rows, columns, warps, stages = row[FEATURES.index(features)]
    return Shape(rows, columns, features, warps, stages)


def keys_shape(architecture: int, precision: str, features: int) -> Shape:
    """For the kernels whose result is a weighted sum of keys."""
    row = KEYS[_table_of(architecture)][_row_of(precision)]
    return Shape(*row[FEATURES.index(features)])


def _table_of(architecture: int) -> int:
    """90 and 100 stand for themselves and their variants, 8.x and 12.x have less shared memory."""
    family = architecture // 10 * 10
    return family if family in ARCHITECTURES else 80


def _row_of(precision: str) -> str:
    return "half" if precision in HALF else precision
