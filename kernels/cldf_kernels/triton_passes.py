"""`TritonPasses`: the N x N work by Triton kernels; what is stored for them, how they are launched.

Keys are stored as z sqrt(log2 e / temperature), so that a product of two is a score in base 2 and
exp costs one instruction. That rounds no worse than z itself would be.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from torch import Tensor

from cldf_kernels.arguments import Precision
from cldf_kernels.block_schedule import (
    KeyRange,
    positive_ranges,
    schedule_blocks,
    softmax_ranges,
)
from cldf_kernels.devices import architecture, current_device, num_processors
from cldf_kernels.pair_index import PairIndex
from cldf_kernels.passes import EMPTY_LSE
from cldf_kernels.triton_kernels.lse_backward import lse_backward_kernel
from cldf_kernels.triton_kernels.lse_forward import lse_forward_kernel
from cldf_kernels.triton_kernels.lse_forward_symmetric import lse_forward_symmetric_kernel
from cldf_kernels.triton_kernels.softplus_backward import softplus_backward_kernel
from cldf_kernels.triton_kernels.softplus_forward import softplus_forward_kernel
from cldf_kernels.triton_kernels.tile_shapes import (
    INPUT_PRECISION,
    TileShape,
    backward_shape,
    forward_shape,
    has_symmetric_forward,
    padded_features,
)

# Base 2. While no |score| exceeds it, exp needs no shift in float32: sums of 2^22 terms and their
# products with coefficients stay normal.
PLAIN_LIMIT = 86.0
# Below it fp16 keys would become subnormal, beyond it they would overflow.
FP16_RANGE = (2.0**-16, 2.0**30)
# Coefficients are scaled to at most 2^13: then fp16 weights neither overflow nor vanish.
COEFFICIENT_EXPONENT = 12
SMALLEST_COEFFICIENT = 1e-300  # where all are 0, any power of two does
MAX_ELEMENTS = 2**31 - 1  # addresses in the kernels are int32
PROGRAMS_PER_PROCESSOR = 4  # enough to hide latencies; fewer blocks of queries divide their keys
MAX_SPLITS = 16

HALF, FULL = torch.float16, torch.float32
STORED = {"fp16": HALF, "bf16": torch.bfloat16, "tf32": FULL, "fp32": FULL}


class BackwardInputs(NamedTuple):
    """float32 values that a backward kernel reads, in the order of its arguments."""

    query_coefficients: Float32[Tensor, " local"]
    query_lse: Float32[Tensor, " local"]
    key_coefficients: Float32[Tensor, " keys"]
    key_lse: Float32[Tensor, " keys"]


class TritonPasses:
    """`Passes` for float32 embeddings."""

    def __init__(
        self,
        index: PairIndex,
        z: Float32[Tensor, "local features"],
        *,
        temperature: float,
        precision: Precision,
        deterministic: bool,
    ) -> None:
        self.index = index
        self.schedule = schedule_blocks(index)
        self.num_features = z.shape[1]
        self.width = padded_features(self.num_features)
        self.scale = math.sqrt(math.log2(math.e) / temperature)
        keys = index.keys(z)
        if len(keys) * self.width > MAX_ELEMENTS:
            raise ValueError(
                f"supcon_loss: {len(keys)} keys (pixels of all ranks, and the bank) of "
                f"{self.width} features (padded) exceed {MAX_ELEMENTS} numbers, the limit of "
                'Triton\'s kernels; sample fewer pixels, or use backend="torch"'
            )
        largest = index.max_squared_norm
        if largest is None:  # with a bank
            largest = float(keys.square().sum(1).max()) if len(keys) else 0.0
        largest *= self.scale**2
        self.plain = largest <= PLAIN_LIMIT  # False for NaN
        self.precision = _choose_precision(precision, largest)
        machine = architecture(z.device)
        self.forward_shape = forward_shape(machine, self.precision, self.width)
        self.backward_shape = backward_shape(machine, self.precision, self.width)
        self.keys = self._store(keys, self.schedule.key_order)
        order = self.schedule.query_order
        self.queries = self.keys[: len(z)] if order is None else self._store(z, order)
        self.visits_pairs_once = (
            self.plain
            and self.schedule.key_order is None
            and not deterministic
            and has_symmetric_forward(machine)
        )

    def lse_forward(self, z: Float32[Tensor, "local features"]) -> Float64[Tensor, " local"]:
        """Return log Σ_j exp(s_ij) of each local anchor; see `Passes`."""
        ranges = softmax_ranges(self.index, bank=True)
        if not self.plain:
            log2_sums = torch.cat([self._lse_forward(key_range) for key_range in ranges])
            return self._finished_lse(torch.logsumexp(log2_sums * math.log(2), dim=0))
        terms = []
        if self.visits_pairs_once:
            terms.append(self._lse_forward_symmetric(len(z)))
            others = [KeyRange.OTHER_RANKS] if self.index.num_anchors > len(z) else []
            ranges = others + ranges[1:]
        terms += [self._lse_forward(key_range).sum(0) for key_range in ranges]
        return self._finished_lse(functools.reduce(torch.add, terms).log_())

    def lse_backward(
        self,
        z: Float32[Tensor, "local features"],
        lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float32[Tensor, "local features"]:
        """Return the keys weighted by both softmaxes; see `Passes`."""
        coefficients, factor = self._scaled_coefficients(upstream)
        if self.plain:
            of_queries, of_keys = self._per_query_and_key(coefficients.mul_(torch.exp(-lse)))
            inputs = BackwardInputs(of_queries, of_queries, of_keys, of_keys)  # lse is not read
        else:
            inputs = self._backward_inputs(coefficients, lse / math.log(2))
        ranges = softmax_ranges(self.index, bank=bank)
        return self._weighted_keys(
            lse_backward_kernel, inputs, ranges, factor, ONLINE=not self.plain
        )

    def softplus_forward(
        self, z: Float32[Tensor, "local features"], negative_lse: Float64[Tensor, " keys"]
    ) -> tuple[Float64[Tensor, " local"], Float64[Tensor, " local"]]:
        """Return the sums of softplus(B_i - s_ip) and of its derivative; see `Passes`."""
        losses = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        sigmoids = torch.zeros_like(losses)
        of_queries, _ = self._per_query_and_key(negative_lse / math.log(2))
        for key_range in positive_ranges(self.index, bank=True):
            blocks, num_splits = self._blocks(key_range, self.forward_shape)
            loss = torch.empty(num_splits, len(z), dtype=torch.float32, device=z.device)
            sigmoid = torch.empty_like(loss)
            self._launch(
                softplus_forward_kernel,
                (len(blocks),),
                (self.queries, self.keys, blocks, of_queries, loss, sigmoid),
                self.forward_shape,
            )
            losses += loss.double().sum(0)
            sigmoids += sigmoid.double().sum(0)
        return self._unsorted(losses) * math.log(2), self._unsorted(sigmoids)

    def softplus_backward(
        self,
        z: Float32[Tensor, "local features"],
        negative_lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float32[Tensor, "local features"]:
        """Return the keys weighted by both sigmoids; see `Passes`."""
        coefficients, factor = self._scaled_coefficients(upstream)
        inputs = self._backward_inputs(coefficients, negative_lse / math.log(2))
        ranges = positive_ranges(self.index, bank=bank)
        return self._weighted_keys(softplus_backward_kernel, inputs, ranges, factor)

    def _lse_forward_symmetric(self, num_queries: int) -> Float64[Tensor, " local"]:
        """Return the sums over the local anchors, taken in an order that varies."""
        shape = self.forward_shape
        sums = torch.zeros(num_queries, dtype=torch.float32, device=self.keys.device)
        num_blocks = -(-num_queries // shape.block_queries)
        num_tiles = -(-num_queries // shape.block_keys)
        tiles_per_program = min(max(num_blocks * num_tiles // 8192, 1), 32)
        self._launch(
            lse_forward_symmetric_kernel,
            (num_blocks, -(-num_tiles // tiles_per_program)),
            (self.queries, sums, num_queries, tiles_per_program),
            shape,
        )
        return sums.double()

    def _lse_forward(self, key_range: KeyRange) -> Float64[Tensor, "splits local"]:
        """Return the sums of each split of the keys, or their log2 outside the plain range."""
        blocks, num_splits = self._blocks(key_range, self.forward_shape)
        size, device = (num_splits, len(self.queries)), self.keys.device
        sums = torch.empty(size, dtype=torch.float32, device=device)
        self._launch(
            lse_forward_kernel,
            (len(blocks),),
            (self.queries, self.keys, blocks, sums),
            self.forward_shape,
            ONLINE=not self.plain,
        )
        return sums.double()

    def _weighted_keys(
        self,
        kernel: Any,
        inputs: BackwardInputs,
        ranges: list[KeyRange],
        factor: Float32[Tensor, ""],
        **constants: bool,
    ) -> Float32[Tensor, "local features"]:
        shape = self.backward_shape
        size = (len(self.queries), self.width)
        total: Tensor | None = None
        for key_range in ranges:
            blocks, num_splits = self._blocks(key_range, shape)
            result = torch.empty(num_splits, *size, dtype=torch.float32, device=self.keys.device)
            self._launch(
                kernel,
                (len(blocks), self.width // shape.block_features),
                (self.queries, self.keys, blocks, *inputs, result),
                shape,
                BLOCK_FEATURES=shape.block_features,
                **constants,
            )
            of_range = result[0] if num_splits == 1 else result.sum(0)
            total = of_range if total is None else total.add_(of_range)
        assert total is not None  # there is always a range
        return self._unsorted(total[:, : self.num_features] * factor)

    def _launch(
        self,
        kernel: Any,  # a function of Triton's, which has no types
        grid: tuple[int, ...],
        arguments: tuple[Tensor | int, ...],
        shape: TileShape,
        **constants: int,
    ) -> None:
        if grid[0] == 0:
            return
        with current_device(self.keys.device):
            kernel[grid](
                *arguments,
                FEATURES=self.width,
                BLOCK_QUERIES=shape.block_queries,
                BLOCK_KEYS=shape.block_keys,
                PRECISION=INPUT_PRECISION[self.precision],
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
                **constants,
            )

    def _blocks(
        self, key_range: KeyRange, shape: TileShape
    ) -> tuple[Int32[Tensor, "blocks fields"], int]:
        """Return the table of blocks, and into how many splits the keys of each are divided."""
        num_blocks = -(-len(self.queries) // shape.block_queries)
        num_programs = num_blocks * (self.width // shape.block_features)
        wanted = PROGRAMS_PER_PROCESSOR * num_processors(self.keys.device)
        num_splits = min(max(-(-wanted // max(num_programs, 1)), 1), MAX_SPLITS)
        table = self.schedule.blocks(
            key_range, shape.block_queries, shape.block_keys, num_splits, device=self.keys.device
        )
        return table, num_splits

    def _store(
        self, rows: Float32[Tensor, "rows features"], order: Int64[Tensor, " rows"] | None
    ) -> Float[Tensor, "rows width"]:
        """Return rows as the kernels take them: scaled, in their precision, padded, in order."""
        if order is not None:
            rows = rows[order]
        padded = self.width > self.num_features
        make = torch.zeros if padded else torch.empty
        stored = make(len(rows), self.width, dtype=STORED[self.precision], device=rows.device)
        torch.mul(rows, self.scale, out=stored[:, : self.num_features] if padded else stored)
        if self.precision == "tf32":  # tensor cores drop the low 13 bits: round to nearest before
            stored = ((stored.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return stored

    def _backward_inputs(self, coefficients: Tensor, lse: Tensor) -> BackwardInputs:
        query_coefficients, key_coefficients = self._per_query_and_key(coefficients)
        query_lse, key_lse = self._per_query_and_key(lse)
        return BackwardInputs(query_coefficients, query_lse, key_coefficients, key_lse)

    def _per_query_and_key(
        self, values: Float64[Tensor, " keys"]
    ) -> tuple[Float32[Tensor, " local"], Float32[Tensor, " keys"]]:
        """Return the values of the queries and of the keys, in the order of the schedule."""
        key_order, query_order = self.schedule.key_order, self.schedule.query_order
        if key_order is None or query_order is None:
            of_keys = values.float()
            return of_keys[: len(self.queries)], of_keys
        return values[query_order].float(), values[key_order].float()

    def _scaled_coefficients(
        self, upstream: Float64[Tensor, " keys"]
    ) -> tuple[Float64[Tensor, " keys"], Float32[Tensor, ""]]:
        """Return u times a power of two, and what takes it and the stored scale off a result."""
        if len(upstream) == 0:
            return upstream.clone(), upstream.new_ones((), dtype=torch.float32)
        largest = torch.linalg.vector_norm(upstream, math.inf).clamp_min_(SMALLEST_COEFFICIENT)
        unit = largest / torch.frexp(largest).mantissa.mul_(2.0 ** (COEFFICIENT_EXPONENT + 1))
        return upstream / unit, (unit / self.scale).float()

    def _finished_lse(self, of_queries: Float64[Tensor, " local"]) -> Float64[Tensor, " local"]:
        lse = self._unsorted(of_queries)
        return lse.masked_fill(lse == -torch.inf, EMPTY_LSE)

    def _unsorted(self, of_queries: Float[Tensor, " local *rest"]) -> Float[Tensor, " local *rest"]:
        order = self.schedule.query_order
        if order is None:
            return of_queries
        return torch.empty_like(of_queries).index_copy_(0, order, of_queries)


def _choose_precision(precision: Precision, largest: float) -> Precision:
    """Return fp16 for "auto" where scores and keys are in its range; `largest` score in base 2."""
    low, high = FP16_RANGE
    if precision == "auto":
        return "fp16" if low <= largest <= PLAIN_LIMIT else "fp32"
    if precision == "fp16" and (largest > high or 0 < largest < low):
        raise ValueError(
            f'supcon_loss: precision="fp16" takes |z|^2 / temperature from {low * math.log(2):g} '
            f"to {high * math.log(2):g}, got {largest * math.log(2):g}; normalise the embeddings, "
            'or use precision="fp32"'
        )
    return precision
