"""Being asked to stop: by a scheduler (SIGTERM, SIGUSR1) or by a person (Ctrl-C)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cldf_dist.processes import accelerator, processes


class Stopped(Exception):
    """Raised after the checkpoint is written; holds the signal that asked."""

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}, all saved")
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and the first Ctrl-C instead of dying; a second Ctrl-C kills."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(asked: list[int]) -> int:
    """The signal that any rank received, on all ranks; 0 where none did."""
    mine = max(asked, default=0)
    if processes().world_size == 1:
        return mine
    import torch

    flag = torch.tensor(mine, device=accelerator().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)
