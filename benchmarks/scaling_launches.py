"""One and two CPU processes measured in turn, and what the model says of the two from the one."""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scaling_model
import train_setup
from scaling_model import FLOAT32, Network, Training
from train_setup import ROOT, Case

WORKER = Path(__file__).parent / "scaling_training.py"
SMALL_BYTES = 4
# of every step, on the wall and of CPU time; by slices of a process, slices of all, or bytes
Laps = list[list[float]]
Seconds = dict[int, Laps]
BEST: dict[str, Callable[[Laps], float]] = {
    "median_ms": lambda laps: statistics.median(wall for wall, _ in laps),
    "min_ms": lambda laps: min(wall for wall, _ in laps),
    "cpu_ms": lambda laps: statistics.median(cpu for _, cpu in laps),
}


@dataclass
class Found:
    """Seconds of every step of all launches, by the number of processes of the launch."""

    fit: dict[int, Seconds] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    apart: dict[int, Seconds] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    all_reduce: Seconds = field(default_factory=lambda: defaultdict(list))
    checkpoint: Laps = field(default_factory=list)


def environment(processes: int) -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    return found if processes == 1 else {**found, "ACCELERATE_USE_CPU": "true"}


def command(processes: int, *words: str) -> list[str]:
    """Python with these words, alone or by accelerate's launcher."""
    if processes == 1:
        return [sys.executable, *words]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    cpu = str(ROOT / "configs/accelerate/cpu.yaml")
    return [*launcher, "--config_file", cpu, "--num_processes", str(processes), *words]


def measure(case: Case, num_steps: int, rounds: int, folder: Path) -> Found:
    """Launches of one and of two processes in turn."""
    found, batch = Found(), case.config().diffusion.fit.batch_size
    sizes = [SMALL_BYTES, _gradient_bytes(case)]
    for number in range(rounds):
        for processes in (1, 2):
            output = folder / f"{processes}.json"
            batches = [batch * processes // 2, batch * processes]
            words = [
                *("--config", *case.files, "--folder", str(folder / "runs")),
                *("--batches", *map(str, batches), "--steps", str(num_steps)),
                *("--output", str(output), "--sizes", *map(str, sizes)),
                *(["--checkpoint"] if number == 0 else []),
            ]
            _run(command(processes, str(WORKER), *words), environment(processes))
            _take(found, processes, json.loads(output.read_text()))
    return found


def compare(case: Case, found: Found) -> Iterator[dict[str, Any]]:
    """The columns of each row: what was measured, and for two processes what was predicted."""
    size = _gradient_bytes(case)
    for batch, seconds in found.fit[1].items():
        yield {"what": "fit", "processes": 1, "batch_size": batch, **_times(seconds)}
    for processes, by_local in found.apart.items():
        for local, seconds in by_local.items():
            what = f"bare loop of {local} slices in each process, nothing exchanged"
            yield {"what": what, "processes": processes, **_times(seconds)}
    for num_bytes, seconds in found.all_reduce.items():
        about = {"bytes": num_bytes, "bytes_per_second": num_bytes / BEST["median_ms"](seconds)}
        yield {"what": "all-reduce alone", "processes": 2, **_times(seconds), **about}
    for batch, seconds in found.fit[2].items():
        times = _times(seconds)
        for name, best in BEST.items():
            times[f"predicted_{name}"] = 1000 * _predicted(case, found, batch, best)
            times[f"error_{name}"] = times[f"predicted_{name}"] / times[name] - 1
        yield {"what": "fit", "processes": 2, "batch_size": batch, **times}
    about = {"bytes": 4 * size, "bytes_per_second": 4 * size / BEST["median_ms"](found.checkpoint)}
    yield {"what": "checkpoint", "processes": 1, **_times(found.checkpoint), **about}


def network(size: int, all_reduce: Seconds, best: Callable[[Laps], float]) -> Network:
    """From an all-reduce of `size` bytes and one of next to nothing; two processes."""
    nothing, whole = best(all_reduce[SMALL_BYTES]), best(all_reduce[size])
    return Network(size / max(whole - nothing, 1e-9), nothing / 2, overlap=0.0)


def _predicted(case: Case, found: Found, batch: int, best: Callable[[Laps], float]) -> float:
    """Seconds of a step of two processes, from `fit` on one, how much slower two bare loops are
    side by side than one alone, and the all-reduce alone."""
    local = batch // 2
    alone, beside = best(found.apart[1][local]), best(found.apart[2][local])
    slower = max(beside / alone, 1.0)
    training = Training(
        parameters=_gradient_bytes(case) // FLOAT32,
        batch_size=batch,
        seconds={local: slower * best(seconds) for local, seconds in found.fit[1].items()},
    )
    size = _gradient_bytes(case)
    return scaling_model.step(training, 2, network(size, found.all_reduce, best)).seconds


def _gradient_bytes(case: Case) -> int:
    return scaling_model.gradient_bytes(train_setup.size_of(case.config()).parameters)


def _times(laps: Laps) -> dict[str, Any]:
    return {"count": len(laps), **{name: 1000 * best(laps) for name, best in BEST.items()}}


def _run(words: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[-20:]} ended with {done.returncode}: {done.stderr[-3000:]}")


def _take(found: Found, processes: int, measured: dict[str, Any]) -> None:
    for name in ("fit", "apart"):
        for key, seconds in measured[name].items():
            getattr(found, name)[processes][int(key)] += seconds
    for key, seconds in measured["all_reduce"].items():
        found.all_reduce[int(key)] += seconds
    found.checkpoint += measured.get("checkpoint", [])
