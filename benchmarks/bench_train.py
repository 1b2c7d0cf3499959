"""Speed of a training: what `fit` adds to a bare loop on CPU, and how fast a GPU takes a step.

On CPU, one thread: parameters and model FLOPs of several nets (sizes); CPU time per optimizer step
of `fit` against the bare loop, in alternating steps, with and without MLflow, for the demo's net on
pictures so small that milliseconds can be told apart (overhead) and on its own (demo); one step of
a net in guided-diffusion's sizes (large). On CUDA: the ladder from float32 to CUDA graphs for the
BraTS net at 256x256x4, and what a real `fit` waits for its loader processes. Rows are appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py
    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --parts overhead --rounds 9
    python benchmarks/bench_train.py --device cuda --batch 16 --workers 8
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_ladder
import train_overhead
import train_setup
from contrast_device import measure_ceilings
from train_results import Circumstances, Row, append_rows, check_columns, circumstances
from train_setup import Case

from cldf_dist.config import Config
from cldf_dist.training.throughput import peak_tflops

RESULTS = Path(__file__).parent / "results" / "train.csv"
PARTS = {"cpu": ("sizes", "overhead", "demo", "large"), "cuda": ("sizes", "ladder")}
SIZES = (
    train_setup.DEMO,
    train_setup.SMALL,
    train_setup.BRATS,
    train_setup.BRATS_256,
    train_setup.GUIDED_DIFFUSION,
)


@dataclass(frozen=True)
class Peaks:
    """FLOPs per second of dense bf16 products; 0 where the data sheet is not known."""

    stated: float
    measured: float


def main() -> None:
    """Measure the parts that were asked for, print tables, append the rows."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output)
    except ValueError as error:
        sys.exit(f"bench_train.py: {error}")
    torch.set_num_threads(1)
    device = _device(arguments)
    about = circumstances(device)
    print(f"{about.device}; {about.versions}")
    measure: dict[str, Callable[..., Iterator[Row]]] = {
        "sizes": _sizes,
        "overhead": partial(_overhead, train_setup.SMALL_PICTURES, 20),  # they are fast
        "demo": partial(_overhead, train_setup.DEMO, 1),
        "large": _large,
        "ladder": _ladder,
    }
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            words = [f"runs={folder}", "tracking.enabled=false"]
            for row in measure[part](arguments, about, words):
                _print(row)
                append_rows(arguments.output, [row])
    print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=tuple(PARTS), default="cpu")
    known = sorted({part for parts in PARTS.values() for part in parts})
    parser.add_argument("--parts", choices=known, nargs="+", help="default: those of the device")
    for name, default, what in (
        ("rounds", 5, "of which the median counts"),
        ("steps", 10, "of a round, best a multiple of the config's log_every"),
        ("warmup", 10, "steps of the ladder that are not counted"),
        ("batch", 8, "of the ladder"),
        ("workers", 4, "loader processes of the ladder's fit"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default %(default)s"
        )
    rungs = [rung.name for rung in train_ladder.RUNGS]
    parser.add_argument(
        "--rungs", choices=rungs, nargs="+", metavar="NAME", help=f"default all: {', '.join(rungs)}"
    )
    parser.add_argument("--tiny", action="store_true", help="the debug net: does it run?")
    parser.add_argument("--folder", type=Path, help="where slices are written, then removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name in ("rounds", "steps", "warmup", "batch", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    arguments.parts = arguments.parts or PARTS[arguments.device]
    if arguments.device == "cuda" and set(arguments.parts) - set(PARTS["cuda"]):
        parser.error("overhead, demo and large are CPU time: they belong to --device cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def _device(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _sizes(arguments: argparse.Namespace, about: Circumstances, words: list[str]) -> Iterator[Row]:
    for case in [train_setup.DEBUG] if arguments.tiny else SIZES:
        yield _row(about, case, case.config(*words), "size of the net")


def _overhead(
    case: Case,
    times_steps: int,
    arguments: argparse.Namespace,
    about: Circumstances,
    words: list[str],
) -> Iterator[Row]:
    """`fit` beside the bare loop; `times_steps` as many steps a round as --steps says."""
    case, times_steps = (train_setup.DEBUG, 1) if arguments.tiny else (case, times_steps)
    config = case.config(*words)
    row = partial(_row, about, case, config)
    train_setup.prepare_slices(config)
    for name, seconds in train_overhead.measure_parts(config, calls=50).items():
        yield row(name, cpu_ms=1000 * seconds)
    plan = train_overhead.Plan(3, times_steps * arguments.steps, arguments.rounds)
    for name, found in train_overhead.measure_fit(config, plan).items():
        numbers = {"steps": plan.steps, "rounds": plan.rounds}
        yield row(f"bare loop beside {name}", cpu_ms=_median_ms(found.bare), **numbers)
        numbers["over_bare_ms"] = _median_ms(found.over_bare)
        numbers["over_bare_min_ms"] = 1000 * min(found.over_bare)
        numbers["over_bare_max_ms"] = 1000 * max(found.over_bare)
        yield row(name, cpu_ms=_median_ms(found.fit), **numbers)


def _large(arguments: argparse.Namespace, about: Circumstances, words: list[str]) -> Iterator[Row]:
    """One step of the largest net, on made-up slices: a minute or two."""
    case = train_setup.DEBUG if arguments.tiny else train_setup.GUIDED_DIFFUSION
    config = case.config(*words)
    row = partial(_row, about, case, config)
    for name, seconds in train_overhead.measure_parts(config, calls=3).items():
        yield row(name, cpu_ms=1000 * seconds)
    plan = train_overhead.Plan(warmup=1, steps=1, rounds=1)
    yield row("bare loop", cpu_ms=_median_ms(train_overhead.measure_bare(config, plan)), steps=1)


def _ladder(arguments: argparse.Namespace, about: Circumstances, words: list[str]) -> Iterator[Row]:
    """Every rung, then a real `fit`; all shares of the peak are of that for bf16 (CPU: float32)."""
    case = train_setup.DEBUG if arguments.tiny else train_setup.BRATS_256
    config = case.config(*words, f"diffusion.fit.batch_size={arguments.batch}")
    device = _device(arguments)
    ceilings = measure_ceilings(device, tiny=arguments.tiny)
    print(ceilings.sources)
    peaks = Peaks(
        stated=1e12 * peak_tflops(device, torch.bfloat16),
        measured=ceilings.flop["bf16" if ceilings.is_cuda else "fp32"],
    )
    plan = train_ladder.Plan(device, arguments.warmup, arguments.steps, arguments.rounds)
    for rung in train_ladder.RUNGS:
        if arguments.rungs and rung.name not in arguments.rungs:
            continue
        speed = train_ladder.measure_rung(rung, config, plan)
        if isinstance(speed, str):
            print(f"{rung.name}: left out, {speed}")
        else:
            yield _speed_row(_row(about, case, config, rung.name), speed, plan, peaks)
    train_setup.prepare_slices(config)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        speed = train_ladder.measure_loaded(config, plan, arguments.workers, compiled=compiled)
        name = f"fit, {arguments.workers} loader processes" + (", compile" if compiled else "")
        yield _speed_row(_row(about, case, config, name), speed, plan, peaks)


def _row(
    about: Circumstances, case: Case, config: Config, implementation: str, **numbers: Any
) -> Row:
    return Row(
        **asdict(about),
        config=case.name,
        implementation=implementation,
        image_size=config.data.image_size,
        batch_size=config.diffusion.fit.batch_size,
        **asdict(train_setup.size_of(config)),
        **numbers,
    )


def _speed_row(row: Row, speed: train_ladder.Speed, plan: train_ladder.Plan, peaks: Peaks) -> Row:
    flop = row.batch_size * row.gflop_per_image * 1e9 / speed.seconds
    return replace(
        row,
        steps=plan.steps,
        rounds=plan.rounds,
        device_ms=1000 * speed.seconds,
        images_per_second=row.batch_size / speed.seconds,
        peak_gb=speed.peak_gb,
        data_sheet_utilisation=flop / peaks.stated if peaks.stated else None,
        measured_utilisation=flop / peaks.measured,
        data_wait_fraction=speed.data_wait_fraction,
    )


def _median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _print(row: Row) -> None:
    """The name, then every number that there is, under its column's name."""
    shown = [
        f"{name} {value:.4g}"
        for name, value in asdict(row).items()
        if isinstance(value, float) and name != "gflop_per_image"
    ]
    size = f"{row.parameters / 1e6:.2f} M parameters, {row.gflop_per_image:.4g} GFLOP per image"
    print(f"{row.config}: {row.implementation}: {', '.join(shown) or size}", flush=True)


if __name__ == "__main__":
    main()
