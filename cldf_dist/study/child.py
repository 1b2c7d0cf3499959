"""The subprocess of a study, and the signals that are forwarded to it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from cldf_dist.runs.run import DONE
from cldf_dist.system.locks import FolderLock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.5
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)


class Child:
    """Executes commands one at a time; within its `with` block it forwards signals to them.

    A command has a session of its own, so that a terminal's Ctrl-C reaches it once. On Linux it
    gets SIGTERM when this process is killed.
    """

    def __init__(self, launcher: Sequence[str]) -> None:
        self.received_signals: list[int] = []
        self._launcher = list(launcher)
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []  # signals received while the process was being started
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Child:
        self._previous = {number: signal.signal(number, self._forward) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def execute(self, words: Sequence[str]) -> int:
        """Start the launcher with these words, wait, and return its exit code.

        After a signal nothing is started, and the code is minus its number.
        """
        if self.received_signals:
            return -self.received_signals[-1]
        self._process = None
        self._process = subprocess.Popen(
            [*self._launcher, *words], start_new_session=True, preexec_fn=_end_with_parent
        )
        for number in self._early:
            self._process.send_signal(number)
        return self._process.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received_signals.append(number)
        if self._process is None:
            self._early.append(number)
        elif self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def wait_for_others(folder: Path, child: Child) -> bool:
    """Wait while another process, which outlived its launcher or its study, works in a run folder.

    Returns True where there was one.
    """
    waited = False
    while not child.received_signals and (busy := _in_use(folder)):
        if not waited:
            print(f"study: waits: {busy}", file=sys.stderr, flush=True)
        waited = True
        time.sleep(POLL_SECONDS)
    return waited


def _in_use(folder: Path) -> str:
    """The message of the lock of a stage that another process works in, or ""."""
    for lock in folder.glob("*/.lock"):
        if (lock.parent / DONE).exists():
            continue
        try:
            FolderLock(lock.parent).release()
        except RuntimeError as error:
            return str(error)
    return ""


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)
