"""Predicted and measured: a training on one and two CPU processes, and what a run asks of its disk.

Parts: steps of `fit` on one process, by which the model (`scaling_model.py`) predicts those on two,
the all-reduce alone, and both measured (check); slices a second and core of the training stream
(loader); file operations of each stage, counted by strace (files); and the model for GPUs, from
rows of bench_stages.py, for two made-up networks (predict; printed, not measured). In `check`,
launches of one and of two processes alternate; times are medians and the least of all steps, and
of CPU time, which others on the machine disturb less; one thread a process. What was measured is
appended to --output.

    OMP_NUM_THREADS=1 python benchmarks/bench_scaling.py
    python benchmarks/bench_scaling.py --parts predict --config configs/brats.yaml
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import scaling_files
import scaling_launches
import scaling_table
import torch
import train_setup
from bench_stages import TRAININGS
from contrast_device import call_seconds
from stage_work import write_slices
from train_results import Circumstances, append_rows, check_columns, circumstances
from train_setup import Case

from cldf_dist.config import Config
from cldf_dist.data.readers import datasets
from cldf_dist.data.stream import LabelledSlices, Stream

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
STAGE_RESULTS = Path(__file__).parent / "results" / "stages.csv"
PACKAGES = ("numpy", "torch", "accelerate", "monai", "zarr")
PARTS = ("check", "loader", "files", "predict")
NETS = {"debug": train_setup.DEBUG, "demo": train_setup.DEMO}
LOADED = (
    train_setup.BRATS,
    Case(train_setup.BRATS.files, ("data.image_size=256",)),
    Case(("configs/chaos_liver.yaml",)),
)
LOADED_SLICES = 64
COUNTED = ("prepare", *TRAININGS, "cache", "train-decoder", "segment")


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV; empty where it means nothing."""

    part: str
    config: str
    what: str
    processes: int
    batch_size: int | None = None  # global
    count: int | None = None  # of steps, slices or calls
    median_ms: float | None = None  # of the steps, by the clock on the wall
    min_ms: float | None = None
    cpu_ms: float | None = None  # user and system, of one process; the median
    predicted_median_ms: float | None = None  # by the model
    predicted_min_ms: float | None = None
    predicted_cpu_ms: float | None = None
    error_median_ms: float | None = None  # predicted / measured - 1
    error_min_ms: float | None = None
    error_cpu_ms: float | None = None
    bytes: int | None = None
    bytes_per_second: float | None = None
    slices_per_second: float | None = None


def main() -> None:
    """Measure the parts that were asked for, print, append the rows."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output, Row)
    except ValueError as error:
        sys.exit(f"bench_scaling.py: {error}")
    torch.set_num_threads(1)
    about = circumstances(torch.device("cpu"), script="bench_scaling.py", packages=PACKAGES)
    print(f"{about.device}; {about.versions}")
    measure: dict[str, Callable[..., Iterator[Row]]] = {
        "check": _check,
        "loader": _loader,
        "files": _files,
    }
    for part in arguments.parts:
        if part == "predict":
            print(scaling_table.predictions(arguments.config, arguments.stages))
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for row in measure[part](arguments, about, Path(folder)):
                _print(row)
                append_rows(arguments.output, [row])
    if set(arguments.parts) != {"predict"}:
        print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--nets", choices=NETS, nargs="+", default=list(NETS), help="of the check")
    parser.add_argument("--steps", type=int, default=10, help="of each launch, that count")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each kind")
    parser.add_argument(
        "--tiny", action="store_true", help="small slices and one stage: does it run?"
    )
    parser.add_argument(
        "--config", nargs="+", default=list(train_setup.BRATS.files), help="of the predictions"
    )
    parser.add_argument("--stages", type=Path, default=STAGE_RESULTS, help="rows to predict from")
    parser.add_argument("--folder", type=Path, help="where runs are written, then removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    return arguments


def _check(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    """Steps of one process, then of two with the same batch and with twice as much."""
    for case in [NETS[name] for name in arguments.nets]:
        found = scaling_launches.measure(case, arguments.steps, arguments.rounds, folder)
        for line in scaling_launches.compare(case, found):
            yield Row(**asdict(about), part="check", config=case.name, **line)


def _loader(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    """The training stream, read and changed at random, on one core."""
    for number, case in enumerate([train_setup.DEBUG] if arguments.tiny else LOADED):
        config = case.config(f"runs={folder}")
        seconds = _seconds_per_slice(config, folder / str(number), LOADED_SLICES)
        side, channels = config.data.image_size, len(datasets.channels(config.data))
        yield Row(
            **asdict(about),
            part="loader",
            config=case.name,
            what="training stream, one core, pages in memory",
            processes=1,
            count=LOADED_SLICES,
            cpu_ms=1000 * seconds,
            bytes=2 * channels * side**2,
            slices_per_second=1 / seconds,
        )


def _seconds_per_slice(config: Config, folder: Path, count: int) -> float:
    """CPU time; the median of eight batches."""
    items = LabelledSlices(
        write_slices(config, folder, count).tables[0], config.diffusion.augment, config.seed
    )
    batches = Stream(items, items.groups, config.seed).batches(0, batch_size=count // 4)
    cpu = torch.device("cpu")
    seconds = [call_seconds(cpu, lambda: next(batches)) for _ in range(9)]
    return statistics.median(seconds[1:]) / (count // 4)


def _files(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    """Each stage of the debug run, on one process and on two."""
    if not scaling_files.can_count():
        print("files: left out, there is no strace")
        return
    for processes in (1, 2):
        environment = scaling_launches.environment(processes)
        runs = folder / str(processes)
        for stage in COUNTED[:1] if arguments.tiny else COUNTED:
            command = scaling_launches.command(
                processes, "-m", "cldf_dist", stage, str(train_setup.ROOT / "configs/debug.yaml"),
                f"runs={runs}", "tracking.enabled=false",
            )  # fmt: skip
            counts = scaling_files.count_calls(command, runs, folder / "log", environment)
            for place, kinds in counts.items():
                for kind, count in kinds.items():
                    what = f"{stage}: {kind}, {place}"
                    yield Row(
                        **asdict(about),
                        part="files",
                        config=train_setup.DEBUG.name,
                        what=what,
                        processes=processes,
                        count=count,
                    )


def _print(row: Row) -> None:
    named = {*Circumstances.__annotations__, "part", "config", "what"}
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in asdict(row).items()
        if value is not None and name not in named
    ]
    print(f"{row.config}: {row.what}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
