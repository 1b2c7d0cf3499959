"""The moving average of the weights, which is what every later stage uses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cldf_dist.system.distributed import processes


class MovingAverage:
    """A frozen copy of a task whose weights follow it: `average = decay * average + ...`."""

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.task: Any = copy.deepcopy(task).requires_grad_(False).eval()
        self._decay = decay
        self._parameters: list[Any] = list(self.task.parameters())
        self._buffers: list[Any] = list(self.task.buffers())
        # the same objects for good, though DeepSpeed gives them other memory
        self._followed: list[Any] = list(task.parameters())
        self._of = task

    def follow(self, step: int, moved: Tensor) -> None:
        """After optimizer step number `step` (from 0); nothing happens unless `moved` is true."""
        decay = min(self._decay, (1 + step) / (10 + step))  # warm-up
        with torch.no_grad():
            if moved.device.type == "cpu":
                if moved:
                    torch._foreach_lerp_(self._parameters, self._followed, 1 - decay)
            else:
                self._follow_on_device(self._followed, (1 - decay) * moved.float())
            # asked for each time: DDP puts others in their place
            for mine, theirs in zip(self._buffers, self._of.buffers()):
                mine.copy_(theirs)

    def take_buffers_of_main(self) -> None:
        """Each process has its own, of batch norm; those of the main one are saved."""
        if processes().world_size > 1:
            for buffer in self._buffers:
                torch.distributed.broadcast(buffer, 0)

    def _follow_on_device(self, current: list[Tensor], share: Tensor) -> None:
        """`share` is 0 for a skipped step; only the device knows, and the host need not wait."""
        towards = torch._foreach_sub(current, self._parameters)
        torch._foreach_mul_(towards, share)
        torch._foreach_add_(self._parameters, list(towards))
