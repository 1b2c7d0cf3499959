"""Progress with rate and time left: a bar in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 20.0


class Progressing:
    """What `progress` yields: call `advance` after each piece of work."""

    def __init__(
        self, label: str, total: int, unit: str, bar: Progress | None, *, shown: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.shown = label, total, unit, shown
        self.done = self.initial = 0
        self.note = ""
        self._bar = bar
        self._task: TaskID | None = None
        self._start = self._last_line = self._last_count = time.monotonic()
        if bar is not None:
            self._task = bar.add_task(label, total=total, note="", rate="")

    def start_at(self, done: int) -> None:
        """Count `done` pieces as finished by an earlier run (they do not count for the rate)."""
        self.done = self.initial = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def is_due(self) -> bool:
        """True a second after it was last asked with this answer: counting may cost something."""
        due = time.monotonic() - self._last_count > 1.0
        if due:
            self._last_count = time.monotonic()
        return due

    def advance(self, pieces: int = 1, note: str = "") -> None:
        self.done += pieces
        self.note = note or self.note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, rate=self._rate())
        elif self.shown and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.print_line()

    def print_line(self) -> None:
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {self._rate()}, "
            f"{self._left()} left {self.note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def _per_second(self) -> float:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (self.done - self.initial) / seconds

    def _rate(self) -> str:
        rate = self._per_second()
        if rate == 0:
            return "nothing new"
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"

    def _left(self) -> str:
        rate = self._per_second()
        if rate == 0:
            return "?"
        seconds = int((self.total - self.done) / rate)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


@contextmanager
def progress(
    label: str, total: int, unit: str = "steps", *, shown: bool = True
) -> Iterator[Progressing]:
    """Count `total` pieces of work; with `shown=False` (other ranks) count silently."""
    if not shown:
        yield Progressing(label, total, unit, None, shown=False)
        return
    if not sys.stderr.isatty():
        counter = Progressing(label, total, unit, None)
        yield counter
        counter.print_line()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=1,  # every frame costs processor time that a training on CPU misses
    ) as bar:
        yield Progressing(label, total, unit, bar)
