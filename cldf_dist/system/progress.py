"""Progress with rate and time left: a bar in a terminal, plain lines at intervals in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 20.0


class Counter:
    """A counter of finished pieces of work: in a `bar`, in lines if `logged`, else silent."""

    def __init__(
        self, label: str, total: int, unit: str, bar: Progress | None, *, logged: bool
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._initial = 0
        self._note = ""
        self._bar, self._logged = bar, logged
        self._task = bar.add_task(label, total=total, speed="", note="") if bar else None
        self._start = self._last_line = self._last_count = time.monotonic()

    def start_at(self, done: int) -> None:
        """Count `done` pieces as finished by an earlier run; the rate leaves them out."""
        self.done = self._initial = done

    def is_due(self) -> bool:
        """True at most once a second, for work whose counting is costly."""
        due = time.monotonic() - self._last_count > 1.0
        if due:
            self._last_count = time.monotonic()
        return due

    def advance(self, pieces: int = 1, note: str = "") -> None:
        """Count finished pieces; `note` replaces the text at the end of the line."""
        self.done += pieces
        self._note = note or self._note
        if self._bar is not None and self._task is not None:
            speed = self._speed()
            self._bar.update(self._task, completed=self.done, speed=speed, note=self._note)
        elif self._logged and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.print_line()

    def print_line(self) -> None:
        """Print the count, rate and time left to stderr."""
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {self._speed()} {self._note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def _speed(self) -> str:
        """The rate since this start, and the time left."""
        rate = (self.done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        if rate == 0:
            return "nothing new, ? left"
        each = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{each}, {timedelta(seconds=int((self.total - self.done) / rate))} left"


@contextmanager
def progress(
    label: str, total: int, unit: str = "steps", *, shown: bool = True
) -> Iterator[Counter]:
    """A counter of `total` pieces of work; silent with `shown=False` (on other ranks)."""
    if not (shown and sys.stderr.isatty()):
        counter = Counter(label, total, unit, None, logged=shown)
        yield counter
        if shown:
            counter.print_line()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]} {task.fields[note]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=1,  # every frame costs processor time that a training on CPU misses
    ) as bar:
        yield Counter(label, total, unit, bar, logged=False)
