"""How long a step or a batch takes, within a given time: rounds of them, and the most memory held.

What is measured calls `Pace.tick` before each unit of its work, until that raises `Enough`.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cldf_dist.training.throughput import memory_gb


class Enough(Exception):
    """The time is over: what was measured is known."""


@dataclass(frozen=True)
class Plan:
    device: torch.device
    seconds: float  # of each measurement, after its warm-up
    rounds: int  # of which the median counts


@dataclass(frozen=True)
class Speed:
    """Of one unit of work, by the clock on the wall; the device's work is waited for."""

    seconds: float  # median of the rounds
    fastest: float
    slowest: float
    num_rounds: int
    peak_gb: float  # allocated on the GPU, or resident in memory


class Pace:
    """Notes the time at the ends of rounds. The first round is one unit; by it the length of the
    others is chosen."""

    def __init__(self, plan: Plan, warmup: int) -> None:
        self._plan = plan
        self._ticks, self._until = 0, warmup
        self._begun: float | None = None
        self._since, self._round_units = 0.0, 1
        self._seconds: list[float] = []
        start_of_peak(plan.device)

    def tick(self) -> None:
        """A unit of work is about to begin; all before it are finished."""
        if self._ticks == self._until:
            self._end_round()
        self._ticks += 1

    def speed(self) -> Speed:
        seconds = self._seconds[1:] or self._seconds  # the first was the pilot
        return Speed(
            seconds=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            num_rounds=len(seconds),
            peak_gb=peak_gb(self._plan.device),
        )

    def _end_round(self) -> None:
        if self._plan.device.type == "cuda":
            torch.cuda.synchronize(self._plan.device)
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
        else:
            self._seconds.append((now - self._since) / self._round_units)
        if len(self._seconds) == 1:
            per_round = self._plan.seconds / self._plan.rounds / self._seconds[0]
            self._round_units = max(1, round(per_round))
        late = self._seconds and now - self._begun >= self._plan.seconds
        if late or len(self._seconds) > self._plan.rounds:
            raise Enough
        self._since, self._until = now, self._ticks + self._round_units


def measure(call: Callable[[], object], plan: Plan, warmup: int = 1) -> Speed:
    """The speed of a call."""
    pace = Pace(plan, warmup)
    with suppress(Enough):
        while True:
            pace.tick()
            call()
    return pace.speed()


def start_of_peak(device: torch.device) -> None:
    """Free what nobody holds, and forget how much was held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device) -> float:
    """The most that was held since `start_of_peak`; 1e9 bytes. On a CPU the whole process counts,
    where the system has no /proc since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return memory_gb(device)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
