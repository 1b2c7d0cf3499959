"""The exponential moving average of the weights, which every later stage uses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cldf_dist.system.distributed import processes


class MovingAverage:
    """A frozen copy of a task: `average = decay * average + (1 - decay) * weights` each step."""

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.task: Any = copy.deepcopy(task).requires_grad_(False).eval()
        self._decay = decay
        self._parameters: list[Any] = list(self.task.parameters())
        self._buffers: list[Any] = list(self.task.buffers())
        # the same objects throughout, though DeepSpeed gives them other memory
        self._followed: list[Any] = list(task.parameters())
        self._of = task

    def follow(self, step: int, moved: Tensor) -> None:
        """Update the average after optimizer step `step` (from 0); a no-op unless `moved`."""
        decay = min(self._decay, (1 + step) / (10 + step))  # warm-up
        with torch.no_grad():
            if moved.device.type == "cpu":
                if moved:
                    torch._foreach_lerp_(self._parameters, self._followed, 1 - decay)
            else:
                self._follow_on_device(self._followed, (1 - decay) * moved.float())
            # looked up each time: DDP replaces them
            for mine, theirs in zip(self._buffers, self._of.buffers()):
                mine.copy_(theirs)

    def take_buffers_of_main(self) -> None:
        """Broadcast the buffers of the main process; batch norm's differ between processes."""
        if processes().world_size > 1:
            for buffer in self._buffers:
                torch.distributed.broadcast(buffer, 0)

    def _follow_on_device(self, current: list[Tensor], fraction: Tensor) -> None:
        """Move the average by `fraction` towards `current`, without a synchronisation.

        `fraction` is 0 for a skipped step, which only the device knows.
        """
        towards = torch._foreach_sub(current, self._parameters)
        torch._foreach_mul_(towards, fraction)
        torch._foreach_add_(self._parameters, list(towards))
