"""The N x N work by Triton kernels: what is stored for them, and how they are launched.

Keys are stored as z sqrt(log2 e / temperature), so that a product of two is a score in base 2 and
exp costs one instruction. That rounds no worse than z itself would be.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cldf_kernels.arguments import Precision
from cldf_kernels.layout import Layout, Met, lay_out
from cldf_kernels.pairs import Pairs
from cldf_kernels.triton_kernels.positive_terms import positive_terms_kernel
from cldf_kernels.triton_kernels.row_sums import row_sums_kernel
from cldf_kernels.triton_kernels.shapes import (
    Shape,
    has_symmetric_forward,
    keys_shape,
    padded_features,
    sums_shape,
)
from cldf_kernels.triton_kernels.sigmoid_keys import sigmoid_keys_kernel
from cldf_kernels.triton_kernels.softmax_keys import softmax_keys_kernel
from cldf_kernels.triton_kernels.symmetric_sums import symmetric_sums_kernel

# Base 2. While no |score| exceeds it, exp needs no shift in float32: sums of 2^22 terms and their
# products with shares stay normal.
PLAIN_LIMIT = 86.0
# Below it fp16 keys would become subnormal, beyond it they would overflow.
FP16_RANGE = (2.0**-16, 2.0**30)
SHARE_EXPONENT = 12  # shares are scaled to at most 2^13: fp16 weights neither overflow nor vanish
SMALLEST_SHARE = 1e-300  # where all shares are 0, any power of two does
MAX_ELEMENTS = 2**31 - 1  # addresses in the kernels are int32
PROGRAMS_PER_PROCESSOR = 4  # enough to hide latencies; fewer blocks of queries divide their keys
MAX_PARTS = 16
INTERPRETED_ARCHITECTURE = 90

STORED = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
INPUT_PRECISION = {"fp16": "ieee", "bf16": "ieee", "tf32": "tf32", "fp32": "ieee"}


class TritonPasses:
    """`exact.Passes` for float32 embeddings."""

    name = "triton"

    def __init__(
        self,
        z: Tensor,
        pairs: Pairs,
        temperature: float,
        *,
        precision: Precision,
        deterministic: bool,
    ) -> None:
        self.pairs = pairs
        self.layout: Layout = lay_out(pairs)
        self.num_features = z.shape[1]
        self.width = padded_features(self.num_features)
        self.scale = math.sqrt(math.log2(math.e) / temperature)
        keys = pairs.keys(z)
        if len(keys) * self.width > MAX_ELEMENTS:
            raise ValueError(
                f"supcon_loss: {len(keys)} keys (pixels of all ranks, and the bank) of "
                f"{self.width} features (padded) exceed {MAX_ELEMENTS} numbers, the limit of "
                "Triton's kernels; "
                'sample fewer pixels, or use backend="torch"'
            )
        largest = pairs.largest
        if largest is None:  # with a bank
            largest = float(keys.square().sum(1).max()) if len(keys) else 0.0
        largest *= self.scale**2
        self.plain = largest <= PLAIN_LIMIT  # False for NaN
        self.precision = _choose(precision, largest)
        self.sums_shape = sums_shape(_architecture(z.device), self.precision, self.width)
        self.keys_shape = keys_shape(_architecture(z.device), self.precision, self.width)
        self.keys = self._store(keys, self.layout.key_order)
        order = self.layout.query_order
        self.queries = self.keys[: len(z)] if order is None else self._store(z, order)
        self.others = pairs.negatives == "other"
        self.symmetric = (
            self.plain
            and self.layout.key_order is None
            and not deterministic
            and has_symmetric_forward(_architecture(z.device))
        )
        self.has_bank = pairs.num_keys > pairs.num_anchors

    def log_sum_exp(self, z: Tensor) -> Tensor:
        met = [Met.REST] if self.others else [Met.SEGMENT]
        bank = [Met.OTHER_CLASSES if self.others else Met.BANK] if self.has_bank else []
        if not self.plain:
            parts = torch.cat([self._row_sums(keys) for keys in met + bank])
            return _as_lse(self._unsorted(torch.logsumexp(parts * math.log(2), dim=0)))
        terms = []
        if self.symmetric:
            terms.append(self._symmetric_sums(len(z)))
            met = [Met.OTHER_RANKS] if self.pairs.num_anchors > len(z) else []
        terms += [self._row_sums(keys).sum(0) for keys in met + bank]
        return _as_lse(self._unsorted(functools.reduce(torch.add, terms).log_()))

    def softmax_keys(self, z: Tensor, lse: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        met = [Met.REST] if self.others else [Met.SEGMENT]
        if bank and self.has_bank:
            met.append(Met.OTHER_CLASSES if self.others else Met.BANK)
        shares, factor = self._scaled_shares(upstream)
        if self.plain:
            of_queries, of_keys = self._per_query_and_key(shares.mul_(torch.exp(-lse)))
            arguments = [of_queries, of_queries, of_keys, of_keys]  # lse is not read
        else:
            arguments = self._arguments(shares, lse / math.log(2))
        return self._weighted_keys(
            softmax_keys_kernel, arguments, met, factor, {"ONLINE": not self.plain}
        )

    def positive_terms(self, z: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        pulls = torch.zeros_like(losses)
        bounds, _ = self._per_query_and_key(bound / math.log(2))
        for met in [Met.SEGMENT] + ([Met.OWN_CLASS] if self.has_bank else []):
            blocks, num_parts = self._blocks(met, self.sums_shape)
            loss = torch.empty(num_parts, len(z), dtype=torch.float32, device=z.device)
            pull = torch.empty_like(loss)
            self._launch(
                positive_terms_kernel,
                (len(blocks),),
                (self.queries, self.keys, blocks, bounds, loss, pull),
                self.sums_shape,
            )
            losses += loss.double().sum(0)
            pulls += pull.double().sum(0)
        return self._unsorted(losses) * math.log(2), self._unsorted(pulls)

    def sigmoid_keys(self, z: Tensor, bound: Tensor, upstream: Tensor, *, bank: bool) -> Tensor:
        met = [Met.SEGMENT] + ([Met.OWN_CLASS] if bank and self.has_bank else [])
        shares, factor = self._scaled_shares(upstream)
        arguments = self._arguments(shares, bound / math.log(2))
        return self._weighted_keys(sigmoid_keys_kernel, arguments, met, factor, {})

    def _symmetric_sums(self, num_queries: int) -> Tensor:
        """Over the own anchors, in an order that varies."""
        shape = self.sums_shape
        sums = torch.zeros(num_queries, dtype=torch.float32, device=self.keys.device)
        num_blocks = -(-num_queries // shape.rows)
        num_tiles = -(-num_queries // shape.columns)
        per_program = min(max(num_blocks * num_tiles // 8192, 1), 32)
        self._launch(
            symmetric_sums_kernel,
            (num_blocks, -(-num_tiles // per_program)),
            (self.queries, sums, num_queries, per_program),
            shape,
        )
        return sums.double()

    def _row_sums(self, met: Met) -> Tensor:
        """(parts, queries) sums, or their log2 outside the plain range; float64."""
        blocks, num_parts = self._blocks(met, self.sums_shape)
        sums = torch.empty(
            num_parts, len(self.queries), dtype=torch.float32, device=self.keys.device
        )
        self._launch(
            row_sums_kernel,
            (len(blocks),),
            (self.queries, self.keys, blocks, sums),
            self.sums_shape,
            ONLINE=not self.plain,
        )
        return sums.double()

    def _weighted_keys(
        self,
        kernel: Any,
        arguments: list[Tensor],
        mets: list[Met],
        factor: Tensor,
        constants: dict[str, Any],
    ) -> Tensor:
        shape = self.keys_shape
        size = (len(self.queries), self.width)
        total: Tensor | None = None
        for met in mets:
            blocks, num_parts = self._blocks(met, shape)
            result = torch.empty(num_parts, *size, dtype=torch.float32, device=self.keys.device)
            self._launch(
                kernel,
                (len(blocks), self.width // shape.result_features),
                (self.queries, self.keys, blocks, *arguments, result),
                shape,
                RESULT_FEATURES=shape.result_features,
                **constants,
            )
            of_range = result[0] if num_parts == 1 else result.sum(0)
            total = of_range if total is None else total.add_(of_range)
        assert total is not None  # every pass meets a range
        return self._unsorted(total[:, : self.num_features] * factor)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Any, shape: Shape, **constants: Any
    ) -> None:
        if grid[0] == 0:
            return
        with _on(self.keys.device):
            kernel[grid](
                *arguments,
                FEATURES=self.width,
                ROWS=shape.rows,
                COLUMNS=shape.columns,
                PRECISION=INPUT_PRECISION[self.precision],
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
                **constants,
            )

    def _blocks(self, met: Met, shape: Shape) -> tuple[Tensor, int]:
        num_blocks = -(-len(self.queries) // shape.rows) * (self.width // shape.result_features)
        wanted = PROGRAMS_PER_PROCESSOR * _num_processors(self.keys.device)
        num_parts = min(max(-(-wanted // max(num_blocks, 1)), 1), MAX_PARTS)
        table = self.layout.blocks(
            met, shape.rows, shape.columns, num_parts, device=self.keys.device
        )
        return table, num_parts

    def _store(self, rows: Tensor, order: Tensor | None) -> Tensor:
        """Rows as the kernels take them: scaled, in their precision, padded, in order."""
        if order is not None:
            rows = rows[order]
        padded = self.width > self.num_features
        make = torch.zeros if padded else torch.empty
        stored = make(len(rows), self.width, dtype=STORED[self.precision], device=rows.device)
        torch.mul(rows, self.scale, out=stored[:, : self.num_features] if padded else stored)
        if self.precision == "tf32":  # tensor cores drop the low 13 bits: round to nearest before
            stored = ((stored.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return stored

    def _arguments(self, shares: Tensor, lse: Tensor) -> list[Tensor]:
        """Both of the queries, both of the keys: as the kernels take them."""
        of_values = (self._per_query_and_key(shares), self._per_query_and_key(lse))
        return [values for pair in zip(*of_values, strict=True) for values in pair]

    def _per_query_and_key(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """float32 values of the queries and of the keys, in their order; `values`: of each key."""
        layout = self.layout
        if layout.key_order is None or layout.query_order is None:
            of_keys = values.float()
            return of_keys[: len(self.queries)], of_keys
        return values[layout.query_order].float(), values[layout.key_order].float()

    def _scaled_shares(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Shares times a power of two, and what takes it and the stored scale off a result."""
        if len(upstream) == 0:
            return upstream.clone(), upstream.new_ones((), dtype=torch.float32)
        largest = torch.linalg.vector_norm(upstream, math.inf).clamp_min_(SMALLEST_SHARE)
        unit = largest / torch.frexp(largest).mantissa.mul_(2.0 ** (SHARE_EXPONENT + 1))
        return upstream / unit, (unit / self.scale).float()

    def _unsorted(self, of_queries: Tensor) -> Tensor:
        order = self.layout.query_order
        if order is None:
            return of_queries
        return torch.empty_like(of_queries).index_copy_(0, order, of_queries)


def _choose(precision: Precision, largest: float) -> Precision:
    """`auto` takes fp16 where scores and keys are in its range; `largest` score in base 2."""
    low, high = FP16_RANGE
    if precision == "auto":
        return "fp16" if low <= largest <= PLAIN_LIMIT else "fp32"
    if precision == "fp16" and (largest > high or 0 < largest < low):
        raise ValueError(
            f'supcon_loss: precision="fp16" takes |z|^2 / temperature from {low * math.log(2):g} '
            f"to {high * math.log(2):g}, got {largest * math.log(2):g}; normalise z, or use "
            'precision="fp32"'
        )
    return precision


def _as_lse(lse: Tensor) -> Tensor:
    """Infinity for an anchor that met no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


@functools.cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
