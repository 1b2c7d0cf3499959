"""Speed of a training: what `fit` adds to a bare loop on CPU, and how fast a GPU takes a step.

On CPU, one thread: parameters and model FLOPs of several nets (sizes); CPU time per optimizer step
of `fit` against the bare loop, in alternating steps, with and without MLflow, for the demo's net on
pictures so small that milliseconds can be told apart (overhead) and on its own (demo); one step of
a net in guided-diffusion's sizes (large). On CUDA: the ladder from float32 to CUDA graphs for the
BraTS net at 256x256x4, and what a real `fit` waits for its loader processes. Rows are appended to
--output.

Beside `fit`, the bare loop trains a copy of the net inside the stream that `fit` reads: it takes a
step with each batch before `fit` gets it. Both see the same batches, under the same load of the
machine, and end with the same weights to the last bit, or nothing is reported. A step of `fit`
lasts from a batch's arrival to the call for the next: loading is in neither. Left out are the first
steps, with all that is made only once (optimizer's state, count of FLOPs), and validation, previews
and checkpoints, which are switched off.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py
    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --parts overhead --rounds 9
    python benchmarks/bench_train.py --device cuda --batch 16 --workers 8
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import torch
import train_ladder
from cases import DIFFUSION, BareLoop, Case, Watched, arithmetic, make_task, run_fit
from harness import ABOUT, Benchmark
from made_up import batches_on
from measure import CPU, Call, alternate, matrix_product_flop, seconds_of
from torch import nn

from cldf_dist.cli.pipeline import run_stage
from cldf_dist.config import Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.stages import stage_named
from cldf_dist.training.ema import MovingAverage
from cldf_dist.training.fit import Batch
from cldf_dist.training.on_slices import training_stream
from cldf_dist.training.step_metrics import SkippedSteps, StepMeans
from cldf_dist.training.throughput import peak_tflops

# times are of an optimizer step
COLUMNS = (
    *ABOUT,
    *("config", "implementation", "image_size", "batch_size"),
    *("parameters", "gflop_per_image"),  # of a forward, and twice as much for the backward
    *("steps", "rounds"),  # steps of a round
    "cpu_ms",  # user and system, of the whole process; median of the rounds
    *("over_bare_ms", "over_bare_min_ms", "over_bare_max_ms"),  # each beside its own bare loop
    *("device_ms", "images_per_second", "peak_gb"),  # on the CUDA device; on CPU, CPU time
    "data_sheet_utilisation",  # model FLOPs over the dense bf16 peak
    "measured_utilisation",  # over the matrix product measured in the same run; CPU: float32
    "data_wait_fraction",
)
PACKAGES = ("torch", "triton", "monai", "accelerate", "xformers", "mlflow-skinny", "mlflow")
ON_CUDA = ("sizes", "ladder")
EVICTED_BYTES = 2**26  # touched before each call of a part: between steps nothing stays in caches
WARMUP = 3  # steps
Seconds = tuple[float, float]  # of a step: the bare loop's and `fit`'s


def main() -> None:
    """Measure the parts that were asked for, append the rows."""
    parts: dict[str, Callable[[Benchmark, Path], None]] = {
        "sizes": _sizes,
        "overhead": partial(_overhead, cases.SMALL_PICTURES, 20),  # they are fast
        "demo": partial(_overhead, cases.DEMO, 1),
        "large": _large,
        "ladder": _ladder,
    }
    bench = Benchmark(__file__, __doc__, COLUMNS, PACKAGES)
    arguments = _parse(bench, list(parts))
    bench.begin()
    arguments.parts = arguments.parts or (
        ON_CUDA if arguments.device == "cuda" else [part for part in parts if part != "ladder"]
    )
    bench.run_parts(parts)


def _parse(bench: Benchmark, parts: list[str]) -> argparse.Namespace:
    bench.shared_options("device", "tiny", "folder")
    bench.option("--parts", choices=parts, nargs="+", help="default: those of the device")
    bench.numbers(
        rounds=(5, "of which the median counts"),
        steps=(10, "of a round, best a multiple of the config's log_every"),
        warmup=(10, "steps of the ladder that are not counted"),
        batch=(8, "of the ladder"),
        workers=(4, "loader processes of the ladder's fit"),
    )
    rungs = [rung.name for rung in train_ladder.RUNGS]
    bench.option(
        "--rungs", choices=rungs, nargs="+", metavar="NAME", help=f"default all: {', '.join(rungs)}"
    )
    arguments = bench.parse()
    if arguments.device == "cuda" and not set(arguments.parts or ()) <= set(ON_CUDA):
        bench.parser.error("overhead, demo and large are CPU time: they belong to --device cpu")
    return arguments


def _sizes(bench: Benchmark, folder: Path) -> None:
    nets = (cases.DEMO, cases.SMALL, cases.BRATS, cases.BRATS_256, cases.GUIDED_DIFFUSION)
    for case in [cases.DEBUG] if bench.arguments.tiny else nets:
        _add(bench, case, case.config(), "size of the net")


def _overhead(case: Case, times_steps: int, bench: Benchmark, folder: Path) -> None:
    """`fit` beside the bare loop; `times_steps` as many steps a round as --steps says."""
    case, times_steps = (cases.DEBUG, 1) if bench.arguments.tiny else (case, times_steps)
    config = case.config_in(folder)
    run_stage(config, stage_named("prepare"))
    for name, seconds in measure_parts(config, calls=50).items():
        _add(bench, case, config, name, cpu_ms=1000 * seconds)
    steps, rounds = times_steps * bench.arguments.steps, bench.arguments.rounds
    for name, found in measure_fit(config, steps, rounds).items():
        bare, ours = ([1000 * seconds for seconds in column] for column in zip(*found))
        over = [more - less for more, less in zip(ours, bare)]
        add = partial(_add, bench, case, config, steps=steps, rounds=rounds)
        add(f"bare loop beside {name}", cpu_ms=statistics.median(bare))
        add(
            name,
            cpu_ms=statistics.median(ours),
            over_bare_ms=statistics.median(over),
            over_bare_min_ms=min(over),
            over_bare_max_ms=max(over),
        )


def _large(bench: Benchmark, folder: Path) -> None:
    """One step of the largest net, on made-up slices: a minute or two."""
    case = cases.DEBUG if bench.arguments.tiny else cases.GUIDED_DIFFUSION
    config = case.config_in(folder)
    for name, seconds in measure_parts(config, calls=3).items():
        _add(bench, case, config, name, cpu_ms=1000 * seconds)
    cpu_ms = 1000 * bare_seconds(config)
    _add(bench, case, config, "bare loop", cpu_ms=cpu_ms, steps=1)


def _ladder(bench: Benchmark, folder: Path) -> None:
    """Every rung, then a real `fit`; all fractions of the peak are of that for bf16."""
    given, device = bench.arguments, bench.device
    case = cases.DEBUG if given.tiny else cases.BRATS_256
    config = case.config_in(folder, f"diffusion.fit.batch_size={given.batch}")
    on_gpu = device.type == "cuda"
    peak = matrix_product_flop(device, "bf16" if on_gpu else "fp32", tiny=given.tiny)
    plan = train_ladder.Plan(device, given.warmup, given.steps, given.rounds)

    def add(name: str, speed: train_ladder.Speed) -> None:
        flop = given.batch * cases.size_of(config)["gflop_per_image"] * 1e9 / speed.seconds
        stated = 1e12 * peak_tflops(device, torch.bfloat16)  # 0 where it is not known
        _add(
            *(bench, case, config, name),
            steps=plan.steps,
            rounds=plan.rounds,
            device_ms=1000 * speed.seconds,
            images_per_second=given.batch / speed.seconds,
            peak_gb=speed.peak_gb,
            data_sheet_utilisation=flop / stated if stated else None,
            measured_utilisation=flop / peak,
            data_wait_fraction=speed.data_wait_fraction,
        )

    for rung in train_ladder.RUNGS:
        if not given.rungs or rung.name in given.rungs:
            speed = train_ladder.measure_rung(rung, config, plan)
            if isinstance(speed, str):
                print(f"{rung.name}: left out, {speed}")
            else:
                add(rung.name, speed)
    run_stage(config, stage_named("prepare"))
    for compiled in (False, True) if on_gpu else (False,):
        name = f"fit, {given.workers} loader processes" + (", compile" if compiled else "")
        add(name, train_ladder.measure_loaded(config, plan, given.workers, compiled=compiled))


def _add(bench: Benchmark, case: Case, config: Config, implementation: str, **numbers: Any) -> None:
    bench.add(
        config=case.name,
        implementation=implementation,
        image_size=config.data.image_size,
        batch_size=config.diffusion.fit.batch_size,
        **cases.size_of(config),
        **numbers,
    )


def measure_fit(config: Config, steps: int, rounds: int) -> dict[str, list[Seconds]]:
    """By implementation, mean seconds of each of the alternating rounds.

    The slices must be prepared; `steps` should be a multiple of `log_every`, that logging counts
    with its share.
    """
    tracked = replace(config, tracking=replace(config.tracking, enabled=True))
    calls = {
        "fit": partial(_round, config, steps),
        "fit, MLflow": partial(_round, tracked, steps),  # sent by another thread, beside both loops
    }
    return alternate(calls, rounds)


def bare_seconds(config: Config) -> float:
    """CPU time of one step of the bare loop alone, after one that is not counted."""
    batch = batches_on(CPU, config, 1)[0]
    bare = BareLoop(_bare_task(config), config)
    with arithmetic():
        return seconds_of(CPU, *[lambda: bare.step(batch)] * 2)[1]


def measure_parts(config: Config, calls: int) -> dict[str, float]:
    """Median CPU seconds of the parts that can be called by themselves, caches evicted.

    The first is the floor: the bytes that a moving average must move, two numbers read and one
    written per parameter, in one call over one array.
    """
    task = _bare_task(config)
    source = torch.ones(sum(parameter.numel() for parameter in task.parameters()))
    target, one, moved = torch.ones_like(source), torch.ones(()), torch.tensor(True)
    average = MovingAverage(task, config.diffusion.fit.ema_decay)
    means, skipped = StepMeans(CPU), SkippedSteps(CPU, 1, config.run_folder)
    evicted = torch.zeros(EVICTED_BYTES, dtype=torch.uint8)

    def keep_records() -> None:
        means.add([{"loss": one}], one, torch.isfinite(one))
        skipped.note(0, [], moved)

    parts: dict[str, Call] = {
        "floor: bytes of the moving average": lambda: target.add_(source),
        "moving average": lambda: average.follow(1000, moved),
        "means, finite check, skipped steps": keep_records,
    }
    return {
        name: statistics.median(
            seconds_of(CPU, lambda: evicted.add_(1), part)[1] for _ in range(calls)
        )
        for name, part in parts.items()
    }


def check_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Raise RuntimeError unless both have the same parameters, to the last bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    if not all(torch.equal(ours, bare) for ours, bare in pairs):
        raise RuntimeError("fit and the bare loop trained different nets: their times say nothing")


def _round(config: Config, steps: int) -> Seconds:
    """Mean seconds per step, from the start of a training."""
    num_steps = WARMUP + steps + 1  # the last has no call for a next batch
    settings = replace(config.diffusion.fit, steps=num_steps, num_workers=0)
    task, bare = make_task(config), BareLoop(_bare_task(config), config)
    seconds: list[Seconds] = []

    @contextmanager
    def timed(batch: Batch) -> Iterator[None]:
        started = time.process_time()
        bare.step(batch)
        handed_on = time.process_time()
        yield
        seconds.append((handed_on - started, time.process_time() - handed_on))

    shards = ShardSet(config.run_folder / "prepare")
    stream = training_stream(config, shards, config.diffusion.augment)
    with arithmetic():
        run_fit(config, DIFFUSION, task, Watched(stream, timed), settings)
    check_same_weights(task, bare.task)
    measured = seconds[WARMUP:]
    assert len(measured) == steps, "the last step is not followed by a call for a batch"
    bare_mean, fit_mean = (statistics.fmean(column) for column in zip(*measured, strict=True))
    return bare_mean, fit_mean


def _bare_task(config: Config) -> nn.Module:
    """With its weights laid out as `fit` does."""
    task: nn.Module = make_task(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return task


if __name__ == "__main__":
    main()
