"""Speed and memory of the supervised contrastive loss against its definition and its floor.

Ours against the definition (naive, N x N), the compiled definition and pytorch-metric-learning, in
one process and in alternating rounds; medians count. First the ceilings of the device, then for
every size the floor: the operations that the loss needs, at those rates. On CPU one thread and its
CPU time; on CUDA the time on the device, the L2 cache flushed before every step. One CSV row per
implementation, size and pass is appended to --output. An implementation that would take too much
time or memory at a size is left out there, and the reason printed.

    python benchmarks/bench_contrast.py --pixels 1024 4096 8192
    python benchmarks/bench_contrast.py --device cuda --pixels 4096 16384 65536 262144 \
        --features 32 64 128 256 --plot benchmarks/results/contrast_cuda.png
    python benchmarks/bench_contrast.py --plot-only --device cpu --plot contrast.png
"""

import argparse
import importlib.metadata
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from contrast_device import (
    PASSES,
    PRECISIONS,
    Ceilings,
    device_name,
    driver_version,
    measure_ceilings,
)
from contrast_implementations import (
    NAMES,
    TEMPERATURE,
    Measured,
    Plan,
    find_implementations,
    measure,
    select,
)
from contrast_results import (
    Circumstances,
    Row,
    append_rows,
    check_columns,
    draw_panels,
    read_panels,
)

RESULTS = Path(__file__).parent / "results" / "contrast.csv"


def main() -> None:
    """Measure, append the rows, plot; what the options leave out is left out."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output)
    except ValueError as error:
        sys.exit(f"bench_contrast.py: {error}")
    if not arguments.plot_only:
        _run(arguments)
    if arguments.plot:
        _plot(arguments)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pixels", type=int, nargs="+", metavar="N", help="default 1024 4096 8192")
    parser.add_argument(
        "--features", type=int, nargs="+", metavar="D", help="default 64; with --plot-only, all"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", choices=PRECISIONS, nargs="+", help="of ours on CUDA, default fp16 bf16 tf32"
    )
    parser.add_argument("--implementations", choices=NAMES, nargs="+", help="default all")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=300,
        help="of one implementation at one size, foreseen from a smaller size; default %(default)s",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="64 and 128 pixels, nothing compiled: does it run?"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the latest rows of --output")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.plot_only and not arguments.plot:
        parser.error("--plot-only needs --plot")
    if arguments.tiny and arguments.pixels:
        parser.error("--tiny chooses the pixels; leave --pixels out")
    if arguments.precision and arguments.device == "cpu":
        parser.error("--precision belongs to --device cuda; on CPU all is computed in fp32")
    if arguments.device == "cuda" and not (arguments.plot_only or torch.cuda.is_available()):
        parser.error("--device cuda: torch sees no CUDA device")
    _fill_in(arguments)
    return arguments


def _fill_in(arguments: argparse.Namespace) -> None:
    if not arguments.plot_only:
        arguments.features = arguments.features or [64]
    arguments.pixels = arguments.pixels or ([64, 128] if arguments.tiny else [1024, 4096, 8192])
    arguments.precision = arguments.precision or ["fp16", "bf16", "tf32"]
    not_tiny = tuple(name for name in NAMES if name != "compiled naive")
    arguments.implementations = arguments.implementations or (not_tiny if arguments.tiny else NAMES)


def _run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device, tiny=arguments.tiny)
    print(f"{device_name(device)}; torch {torch.__version__}; temperature {TEMPERATURE}")
    print(ceilings.sources)
    circumstances = _circumstances(device)
    plan = Plan(device, arguments.rounds, arguments.max_seconds)
    implementations = find_implementations(arguments.implementations, device, arguments.precision)
    for num_features in arguments.features:
        remaining = list(implementations)
        latest: dict[str, Measured] = {}
        for num_pixels in sorted(arguments.pixels):
            _print_floor(ceilings, num_pixels, num_features, arguments.precision)
            selected = select(remaining, num_pixels, latest, plan)
            measured = measure(selected, num_pixels, num_features, plan)
            latest |= {one.implementation.name: one for one in measured}
            succeeded = [one.implementation for one in measured]
            # what failed is not tried again at larger sizes
            remaining = [one for one in remaining if one in succeeded or one not in selected]
            rows = _rows(measured, ceilings, circumstances)
            _print_table(rows)
            append_rows(arguments.output, rows)
    print(f"\nrows appended to {arguments.output}")


def _plot(arguments: argparse.Namespace) -> None:
    try:
        panels = read_panels(
            arguments.output, device_type=arguments.device, features=arguments.features
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench_contrast.py: {error}")
    draw_panels(panels, arguments.plot)
    print(f"plotted to {arguments.plot}")


def _circumstances(device: torch.device) -> Circumstances:
    folder = str(Path(__file__).parent)
    git = ["git", "-C", folder, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    # folders of this machine mean nothing elsewhere
    words = [re.sub(r"^(--\w+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return Circumstances(
        date=datetime.now(UTC).date().isoformat(),
        commit=commit or "none",
        command=shlex.join(["python", "benchmarks/bench_contrast.py", *words]),
        device=device_name(device),
        driver=driver_version(device),
        torch=torch.__version__,
        triton=triton,
    )


def _rows(measured: list[Measured], ceilings: Ceilings, circumstances: Circumstances) -> list[Row]:
    naive = next((one for one in measured if one.implementation.name == "naive"), None)
    rows = []
    for one in measured:
        precision = one.implementation.precision
        floors = ceilings.floor_seconds(one.num_pixels, one.num_features, precision)
        rows += [
            Row(
                **asdict(circumstances),
                implementation=one.implementation.name,
                pass_=name,
                N=one.num_pixels,
                D=one.num_features,
                precision=precision,
                seconds=_round(one.seconds[name]),
                ratio_to_naive=_round(naive.seconds[name] / one.seconds[name]) if naive else None,
                times_floor=_round(one.seconds[name] / floors[name]),
                peak_extra_mb=round(one.peaks_mb[name], 1),
            )
            for name in PASSES
        ]
    return rows


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _print_floor(
    ceilings: Ceilings, num_pixels: int, num_features: int, precisions: list[str]
) -> None:
    print(f"\nN={num_pixels} D={num_features}, floor: {ceilings.form}")
    for precision in precisions if ceilings.is_cuda else ["fp32"]:
        floors = ceilings.floor_seconds(num_pixels, num_features, precision)
        work = ceilings.work_seconds(num_pixels, num_features, precision)
        parts = [
            f"{name} {floors[name]:.3g} (products {work[name][0]:.3g}, exp {work[name][1]:.3g})"
            for name in work
        ]
        print(f"{precision} {floors['both']:.3g} s: {', '.join(parts)}")


def _print_table(rows: list[Row]) -> None:
    columns = ("seconds:", *PASSES, "x naive", "x floor", "peak MB")
    print(f"{columns[0]:<26}" + "".join(f"{column:>11}" for column in columns[1:]))
    for name in dict.fromkeys(row.implementation for row in rows):
        passes = {row.pass_: row for row in rows if row.implementation == name}
        both = passes["both"]
        ratio = "-" if both.ratio_to_naive is None else f"{both.ratio_to_naive:.2f}"
        seconds = "".join(f"{passes[each].seconds:>11.3g}" for each in PASSES)
        print(f"{name:<26}{seconds}{ratio:>11}{both.times_floor:>11.2f}{both.peak_extra_mb:>11.1f}")


if __name__ == "__main__":
    main()
