"""Stop signals of a scheduler (SIGTERM, SIGUSR1) and of a person (Ctrl-C)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cldf_dist.system.distributed import control_group, processes

# A launcher passes the first Ctrl-C on as SIGINT, to processes that the terminal may have told
# already, and the second one as SIGTERM.
SECONDS_OF_ONE_CTRL_C = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """Raised for a stop signal once the checkpoint is written; `number` is that of the signal."""

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}, all saved")
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The received stop signals, a growing list, in place of their usual effect.

    Collects SIGTERM, SIGUSR1 and the first Ctrl-C; a second Ctrl-C ends the process.
    """
    received_signals: list[int] = []
    first_ctrl_c: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        received_signals.append(number)
        if not first_ctrl_c:
            if number == signal.SIGINT:
                first_ctrl_c.append(time.monotonic())
            return
        alone = processes().world_size == 1
        if alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        later = time.monotonic() - first_ctrl_c[0] >= SECONDS_OF_ONE_CTRL_C
        if not alone and later and number != signal.SIGUSR1:
            # at once: what is cleaned up on the way out may wait for other processes
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received_signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopVote:
    """An asynchronous all-reduce of the received stop signals, which runs during a step."""

    def __init__(self, received_signals: list[int]) -> None:
        self.received_signals = received_signals
        self._flag: Any = None
        self._work: Any = None

    def open(self) -> None:
        """Start the all-reduce of the signals received so far; every process must call it."""
        if processes().world_size == 1:
            return
        import torch

        self._flag = torch.tensor(max(self.received_signals, default=0))
        self._work = torch.distributed.all_reduce(
            self._flag,
            op=torch.distributed.ReduceOp.MAX,
            group=control_group(),
            async_op=True,
        )

    def result(self) -> int:
        """The largest number of a signal that any process had received; 0 for none."""
        if processes().world_size == 1:
            return max(self.received_signals, default=0)
        self._work.wait()
        return int(self._flag)
