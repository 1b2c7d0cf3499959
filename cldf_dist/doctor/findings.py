"""Findings: lines for the user, and the view that each process has of its machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line: `level` is ok, warning or error; what is not ok says what to do."""

    level: str
    about: str
    said: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.about:<13} {self.said}"


def ok(about: str, said: str) -> Finding:
    """A finding that needs no action."""
    return Finding("ok", about, said)


def warning(about: str, said: str, remedy: str) -> Finding:
    """A finding that does not prevent a run."""
    return Finding("warning", about, f"{said}; {remedy}")


def error(about: str, said: str, remedy: str) -> Finding:
    """A finding that prevents a run."""
    return Finding("error", about, f"{said}; {remedy}")


@dataclass(frozen=True)
class Seen:
    """The view that one process has of its machine."""

    rank: int
    local_rank: int
    host: str
    process: int
    python: str
    packages: dict[str, str]
    device: str  # the GPU's name, or cpu
    device_bytes: int
    device_free_bytes: int
    driver: str
    shared_memory_bytes: int
    processors: int
    clock: float  # seconds, right after all processes met


def hosts(everyone: Sequence[Seen]) -> Counter[str]:
    """The number of processes of each machine."""
    return Counter(seen.host for seen in everyone)
