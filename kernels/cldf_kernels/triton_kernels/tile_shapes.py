"""`TileShape`s by architecture, precision and features: a plain table, so that runs repeat.

Chosen by compiling ahead of time (kernels/compiled): no spilled register, shared memory within
the architecture's limit, few instructions per exponential. Not yet tuned on a device.
"""

from typing import NamedTuple

FEATURES = (32, 64, 128, 256)  # narrower embeddings are padded with zeros
ARCHITECTURES = (80, 90, 100)  # others from 80 on take the shapes of 80: they fit everywhere
# Where a tile's column sums cost less than its exponentials. On 100 a thread holds one row of the
# scores: there sums over columns cross all threads, and visiting each pair twice costs no more.
SYMMETRIC_FORWARD = (80, 90)


class TileShape(NamedTuple):
    """One program's tile."""

    block_queries: int
    block_keys: int
    block_features: int  # of the result
    num_warps: int
    num_stages: int


HALF = ("fp16", "bf16")
INPUT_PRECISION = {"fp16": "ieee", "bf16": "ieee", "tf32": "tf32", "fp32": "ieee"}  # of tl.dot

Forward = tuple[int, int, int, int]
Backward = tuple[int, int, int, int, int]

# queries, keys, warps, stages, for each of FEATURES
FORWARD: dict[int, dict[str, tuple[Forward, ...]]] = {
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

# queries, keys, features of the result, warps, stages, for each of FEATURES
BACKWARD: dict[int, dict[str, tuple[Backward, ...]]] = {
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
    """Return whether visiting each pair once is faster on this architecture."""
    return _table_of(architecture) in SYMMETRIC_FORWARD


def padded_features(num_features: int) -> int:
    """Return the smallest supported number of features that holds `num_features`."""
    return next(width for width in FEATURES if num_features <= width)


def forward_shape(architecture: int, precision: str, features: int) -> TileShape:
    """Return the tile of the kernels whose result is one number a query."""
    shapes = FORWARD[_table_of(architecture)][_precision_group(precision)]
    queries, keys, warps, stages = shapes[FEATURES.index(features)]
    return TileShape(queries, keys, features, warps, stages)


def backward_shape(architecture: int, precision: str, features: int) -> TileShape:
    """Return the tile of the kernels whose result is a weighted sum of keys."""
    shapes = BACKWARD[_table_of(architecture)][_precision_group(precision)]
    return TileShape(*shapes[FEATURES.index(features)])


def _table_of(architecture: int) -> int:
    """Return the architecture whose table serves this one.

    90 and 100 stand for themselves and their variants; 8.x and 12.x have less shared memory.
    """
    family = architecture // 10 * 10
    return family if family in ARCHITECTURES else 80


def _precision_group(precision: str) -> str:
    return "half" if precision in HALF else precision
