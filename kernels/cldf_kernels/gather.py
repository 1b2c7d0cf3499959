"""Rows of all ranks, for ranks that hold different numbers of them, none included."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that share one loss. Every rank must make the same calls in the same order."""

    process_group: dist.ProcessGroup
    rank: int
    num_rows: tuple[int, ...]  # of each rank

    @property
    def size(self) -> int:
        return len(self.num_rows)

    def rows_of_others(self, rows: Tensor) -> Tensor:
        """The rows of all other ranks in rank order; `rows` are this rank's own."""
        most = max(self.num_rows)
        if most == 0:
            return rows
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in self.num_rows]
        dist.all_gather(received, padded, group=self.process_group)
        counts = enumerate(self.num_rows)
        return torch.cat(
            [received[rank][:num] for rank, num in counts if rank != self.rank] or [rows[:0]]
        )

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the ranks, equal to the last bit on all of them."""
        total = value.clone()
        dist.all_reduce(total, group=self.process_group)
        return total
