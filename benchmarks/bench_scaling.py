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

import statistics
from pathlib import Path

import scaling_files
import scaling_launches
import scaling_table
from cases import BRATS, DEBUG, DEMO, ROOT, Case, num_channels
from harness import ABOUT, RESULTS, Benchmark
from made_up import write_slices
from measure import CPU, seconds_of
from stage_work import SECTIONS

from cldf_dist.config import Config
from cldf_dist.data.stream import LabelledSlices, Stream

COLUMNS = (
    *ABOUT,
    *("part", "config", "what", "processes"),
    *("batch_size", "count"),  # the global one; of steps, slices or calls
    *("median_ms", "min_ms", "cpu_ms"),  # of the steps, by the wall's clock; of one process, median
    *("predicted_median_ms", "predicted_min_ms", "predicted_cpu_ms"),  # by the model
    *("error_median_ms", "error_min_ms", "error_cpu_ms"),  # predicted / measured - 1
    *("bytes", "bytes_per_second", "slices_per_second"),
)
PACKAGES = ("numpy", "torch", "accelerate", "monai", "zarr")
NETS = {"debug": DEBUG, "demo": DEMO}
LOADED = (
    BRATS,
    Case(BRATS.files, ("data.image_size=256",)),
    Case(("configs/chaos_liver.yaml",)),
)
LOADED_SLICES = 64
COUNTED = ("prepare", *SECTIONS, "cache", "train-decoder", "segment")


def main() -> None:
    """Measure the parts that were asked for, append the rows."""
    parts = {"check": _check, "loader": _loader, "files": _files, "predict": _predict}
    bench = Benchmark(__file__, __doc__, COLUMNS, PACKAGES)
    bench.option("--parts", choices=parts, nargs="+", default=list(parts))
    bench.option("--nets", choices=NETS, nargs="+", default=list(NETS), help="of the check")
    bench.numbers(steps=(10, "of each launch, that count"), rounds=(3, "launches of each kind"))
    bench.option("--config", nargs="+", default=list(BRATS.files), help="of the predictions")
    stages = RESULTS / "stages.csv"
    bench.option("--stages", type=Path, default=stages, help="rows to predict from")
    bench.shared_options("tiny", "folder")
    bench.parse()
    bench.begin()
    bench.run_parts(parts)


def _check(bench: Benchmark, folder: Path) -> None:
    """Steps of one process, then of two with the same batch and with twice as much."""
    given = bench.arguments
    for case in [NETS[name] for name in given.nets]:
        found = scaling_launches.measure(case, given.steps, given.rounds, folder)
        for columns in scaling_launches.compare(case, found):
            bench.add(part="check", config=case.name, **columns)


def _loader(bench: Benchmark, folder: Path) -> None:
    """The training stream, read and changed at random, on one core."""
    for number, case in enumerate([DEBUG] if bench.arguments.tiny else LOADED):
        config = case.config_in(folder)
        seconds = _seconds_per_slice(config, folder / str(number))
        bench.add(
            part="loader",
            config=case.name,
            what="training stream, one core, pages in memory",
            processes=1,
            count=LOADED_SLICES,
            cpu_ms=1000 * seconds,
            bytes=2 * num_channels(config) * config.data.image_size**2,
            slices_per_second=1 / seconds,
        )


def _seconds_per_slice(config: Config, folder: Path) -> float:
    """CPU time; the median of eight batches."""
    table = write_slices(config, folder, LOADED_SLICES).tables[0]
    items = LabelledSlices(table, config.diffusion.augment, config.seed)
    size = LOADED_SLICES // 4
    batches = Stream(items, items.groups, config.seed).batches(0, batch_size=size)
    seconds = seconds_of(CPU, *[lambda: next(batches)] * 9)
    return statistics.median(seconds[1:]) / size


def _files(bench: Benchmark, folder: Path) -> None:
    """Each stage of the debug run, on one process and on two."""
    if not scaling_files.can_count():
        print("files: left out, there is no strace")
        return
    for processes in (1, 2):
        environment = scaling_launches.environment()
        runs = folder / str(processes)
        words = [str(ROOT / "configs/debug.yaml"), f"runs={runs}", "tracking.enabled=false"]
        for stage in COUNTED[:1] if bench.arguments.tiny else COUNTED:
            command = scaling_launches.command(processes, "-m", "cldf_dist", stage, *words)
            counts = scaling_files.count_calls(command, runs, folder / "log", environment)
            for (place, kind), count in counts.items():
                what = f"{stage}: {kind}, {place}"
                about = {"part": "files", "config": DEBUG.name, "what": what}
                bench.add(**about, processes=processes, count=count)


def _predict(bench: Benchmark, folder: Path) -> None:
    print(scaling_table.predictions(bench.arguments.config, bench.arguments.stages))


if __name__ == "__main__":
    main()
