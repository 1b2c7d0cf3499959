"""`Ranks`: the processes that share one loss, and the collectives between them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that share one loss. Every rank must make the same calls in the same order."""

    process_group: dist.ProcessGroup
    rank: int
    num_anchors: tuple[int, ...]  # labelled pixels of each rank; any may be 0

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.num_anchors)

    def gather(self, rows: Shaped[Tensor, " local *rest"]) -> Shaped[Tensor, " anchors *rest"]:
        """Return this rank's rows, one per anchor, then the other ranks' in rank order.

        No gradient flows through them.
        """
        most = max(self.num_anchors)
        if most == 0:
            return rows
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in self.num_anchors]
        dist.all_gather(received, padded, group=self.process_group)
        counts = enumerate(self.num_anchors)
        others = [received[rank][:num] for rank, num in counts if rank != self.rank]
        return torch.cat([rows, *others])

    def sum(self, value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the sum of `value` over the ranks, equal to the last bit on all of them."""
        total = value.clone()
        dist.all_reduce(total, group=self.process_group)
        return total
