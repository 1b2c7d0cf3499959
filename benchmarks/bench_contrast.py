"""Speed and memory of the supervised contrastive loss, forward and backward, one thread on CPU.

Ours (tiled) against its definition (naive, N x N) and pytorch-metric-learning, in one process and
in alternating rounds; the median CPU time counts. First the floor: the operations that the
symmetric form needs, at the rates that this machine reaches for a matrix product and for exp.
One CSV row per implementation and size is appended to --output.

    python benchmarks/bench_contrast.py --pixels 1024 4096 8192
"""

import argparse
import csv
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from cldf_kernels import supcon_loss, supcon_reference
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 0.07
NUM_CLASSES = 2
RESULTS = Path(__file__).parent / "results" / "contrast.csv"
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    command: str
    device: str
    torch: str
    implementation: str
    N: int
    D: int
    seconds: float
    ratio_to_naive: float
    peak_extra_mb: float


def main() -> None:
    arguments = _parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    losses = _implementations()
    rows: list[Row] = []
    rates = _machine_rates(512 if arguments.tiny else 1024)
    print(f"{_device()}; torch {torch.__version__}; temperature {TEMPERATURE}")
    print(f"matrix product {rates[0] / 1e9:.1f} GFLOP/s, exp {rates[1] / 1e9:.2f} G/s")
    for num_pixels in [64] if arguments.tiny else arguments.pixels:
        _print_floor(num_pixels, arguments.features, rates)
        rows += _measure(losses, num_pixels, arguments.features, arguments.rounds)
        _print_table([row for row in rows if num_pixels == row.N])
    _append(arguments.output, rows)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024, 4096, 8192], metavar="N")
    parser.add_argument("--features", type=int, default=64, metavar="D")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="64 pixels only: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    return parser.parse_args()


def _implementations() -> dict[str, Loss]:
    losses: dict[str, Loss] = {
        "naive": lambda z, labels: supcon_reference(z, labels, temperature=TEMPERATURE),
        "tiled": lambda z, labels: supcon_loss(z, labels, temperature=TEMPERATURE),
    }
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        print("pytorch-metric-learning is not installed: left out")
    else:
        losses["pytorch-metric-learning"] = SupConLoss(temperature=TEMPERATURE)
    return losses


def _measure(
    losses: dict[str, Loss], num_pixels: int, num_features: int, num_rounds: int
) -> list[Row]:
    z = normalize(torch.randn(num_pixels, num_features), dim=1).requires_grad_()
    labels = torch.randint(0, NUM_CLASSES, (num_pixels,))
    peaks = {name: _peak_extra_mb(loss, z, labels) for name, loss in losses.items()}  # warms up too
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(num_rounds):
        for name, loss in losses.items():
            start = time.process_time()
            _step(loss, z, labels)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        Row(
            date=datetime.now(UTC).date().isoformat(),
            commit=_commit(),
            command=shlex.join(["python", "benchmarks/bench_contrast.py", *sys.argv[1:]]),
            device=_device(),
            torch=torch.__version__,
            implementation=name,
            N=num_pixels,
            D=num_features,
            seconds=round(median, 6),
            ratio_to_naive=round(medians["naive"] / median, 2),
            peak_extra_mb=round(peaks[name], 1),
        )
        for name, median in medians.items()
    ]


def _step(loss: Loss, z: Tensor, labels: Tensor) -> None:
    z.grad = None
    loss(z, labels).backward()  # type: ignore[no-untyped-call]


def _machine_rates(size: int) -> tuple[float, float]:
    """Floating point operations a second of a square matrix product; exponentials a second."""
    matrix, result = torch.rand(size, size), torch.empty(size, size)
    product = _fastest(lambda: torch.mm(matrix, matrix, out=result))
    block = torch.rand(256, 1024)
    exponential = _fastest(lambda: torch.exp(block, out=result.resize_(block.shape)))
    return 2 * size**3 / product, block.numel() / exponential


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(5):
            call()
        times.append((time.process_time() - start) / 5)
    return min(times)


def _print_floor(num_pixels: int, num_features: int, rates: tuple[float, float]) -> None:
    operations = 4 * num_pixels**2 * num_features
    exponentials = num_pixels**2  # one per pair of pixels, forward and backward
    moved = 4 * (3 * num_pixels * num_features + 4 * num_pixels)  # z twice, its gradient, 4 vectors
    print(
        f"\nN={num_pixels} D={num_features}: floor 4 N^2 D = {operations / 1e9:.2f} GFLOP "
        f"({operations / rates[0]:.4f} s) + {exponentials / 1e6:.1f} M exp "
        f"({exponentials / rates[1]:.4f} s); {moved / 1e6:.2f} MB"
    )


def _print_table(rows: list[Row]) -> None:
    print(f"{'implementation':<26}{'CPU seconds':>12}{'x naive':>9}{'peak extra MB':>15}")
    for row in rows:
        print(
            f"{row.implementation:<26}{row.seconds:>12.4f}{row.ratio_to_naive:>9.2f}"
            f"{row.peak_extra_mb:>15.1f}"
        )


def _append(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"\n{len(rows)} rows appended to {path}")


def _peak_extra_mb(loss: Loss, z: Tensor, labels: Tensor) -> float:
    """Rise of the resident memory during one step, in MB; nan where Linux's /proc is missing.

    Memory that the process already holds and reuses does not count.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_kilobytes("VmRSS")
        _step(loss, z, labels)
        return max(0, _status_kilobytes("VmHWM") - before) / 1024
    except OSError:
        _step(loss, z, labels)
        return float("nan")


def _status_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "none"


def _device() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, 1 thread ({model})"


if __name__ == "__main__":
    main()
