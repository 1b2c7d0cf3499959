"""One and two CPU processes measured in turn, and what the model says of the two from the one."""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import scaling_model
from cases import ROOT, Case, size_of
from scaling_model import FLOAT32, Network, Training

WORKER = Path(__file__).parent / "scaling_training.py"
SMALL_BYTES = 4
Laps = list[list[float]]  # of every step, of CPU time and on the wall
BEST: dict[str, Callable[[Laps], float]] = {
    "median_ms": lambda laps: statistics.median(wall for _, wall in laps),
    "min_ms": lambda laps: min(wall for _, wall in laps),
    "cpu_ms": lambda laps: statistics.median(cpu for cpu, _ in laps),
}
# of all launches. By what was measured (fit, apart, all_reduce, checkpoint), the number of
# processes, and its size: slices of all processes, slices of each, bytes
Found = dict[tuple[str, int, int], Laps]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def command(processes: int, *words: str) -> list[str]:
    """Python with these words, alone or by accelerate's launcher."""
    if processes == 1:
        return [sys.executable, *words]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    cpu = str(ROOT / "configs/accelerate/cpu.yaml")
    return [*launcher, "--config_file", cpu, "--num_processes", str(processes), *words]


def measure(case: Case, num_steps: int, rounds: int, folder: Path) -> Found:
    """Launches of one and of two processes in turn."""
    found: Found = defaultdict(list)
    batch, output = case.config().diffusion.fit.batch_size, folder / "found.json"
    for number in range(rounds):
        for processes in (1, 2):
            words = [
                *("--config", *case.files, "--folder", str(folder / "runs")),
                *("--batches", str(batch * processes // 2), str(batch * processes)),
                *("--steps", str(num_steps), "--output", str(output)),
                *("--sizes", str(SMALL_BYTES), str(_gradient_bytes(case))),
                *(["--checkpoint"] if number == 0 else []),
            ]
            _run(command(processes, str(WORKER), *words), environment())
            measured = json.loads(output.read_text())
            found["checkpoint", processes, 0] += measured.pop("checkpoint", [])
            for what, by_size in measured.items():
                for size, laps in by_size.items():
                    found[what, processes, int(size)] += laps
    return found


def compare(case: Case, found: Found) -> Iterator[dict[str, Any]]:
    """The columns of each row: what was measured, and for two processes what was predicted."""
    names = {"all_reduce": "all-reduce alone"}
    for (what, processes, size), laps in found.items():
        if not laps:
            continue
        columns: dict[str, Any] = {
            "what": names.get(what, what),
            "processes": processes,
            "count": len(laps),
        }
        columns |= {name: 1000 * best(laps) for name, best in BEST.items()}
        if what == "apart":
            columns["what"] = f"bare loop of {size} slices in each process, nothing exchanged"
        elif what == "fit":
            columns["batch_size"] = size
            if processes == 2:
                columns |= dict(_errors(case, found, size, columns))
        else:
            moved = size or 4 * _gradient_bytes(case)
            columns |= {"bytes": moved, "bytes_per_second": moved / BEST["median_ms"](laps)}
        yield columns


def _errors(
    case: Case, found: Found, batch: int, measured: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    for name, best in BEST.items():
        predicted = 1000 * _predicted(case, found, batch, best)
        yield f"predicted_{name}", predicted
        yield f"error_{name}", predicted / measured[name] - 1


def _predicted(case: Case, found: Found, batch: int, best: Callable[[Laps], float]) -> float:
    """Seconds of a step of two processes, from `fit` on one, how much slower two bare loops are
    side by side than one alone, and the all-reduce alone."""
    local, size = batch // 2, _gradient_bytes(case)
    slower = max(best(found["apart", 2, local]) / best(found["apart", 1, local]), 1.0)
    training = Training(
        parameters=size // FLOAT32,
        batch_size=batch,
        seconds={local: slower * best(found["fit", 1, local])},
    )
    nothing, whole = best(found["all_reduce", 2, SMALL_BYTES]), best(found["all_reduce", 2, size])
    network = Network(size / max(whole - nothing, 1e-9), nothing / 2, overlap=0.0)
    return scaling_model.step(training, 2, network).seconds


def _gradient_bytes(case: Case) -> int:
    return scaling_model.gradient_bytes(round(size_of(case.config())["parameters"]))


def _run(words: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[-20:]} ended with {done.returncode}: {done.stderr[-3000:]}")
