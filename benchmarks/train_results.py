"""The rows of the training benchmark: what they share, and the CSV file they are appended to.

Circumstances and files serve other benchmarks too, with rows of their own.
"""

import csv
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from contrast_device import device_name, driver_version

PACKAGES = ("torch", "triton", "monai", "accelerate", "xformers", "mlflow-skinny", "mlflow")


@dataclass(frozen=True)
class Circumstances:
    """What all rows of a run share; empty where there is no value."""

    date: str
    commit: str
    command: str
    device: str
    driver: str
    versions: str


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV; empty where nothing was measured. Times are per optimizer step."""

    config: str
    implementation: str
    image_size: int  # pixels
    batch_size: int
    parameters: int
    gflop_per_image: float  # of the model: one forward, and twice as much for the backward
    steps: int | None = None  # of a round
    rounds: int | None = None
    cpu_ms: float | None = None  # user and system, of the whole process; median of the rounds
    over_bare_ms: float | None = None  # median of the rounds, each beside its own bare loop
    over_bare_min_ms: float | None = None
    over_bare_max_ms: float | None = None
    device_ms: float | None = None  # time on the CUDA device; on CPU, CPU time
    images_per_second: float | None = None
    peak_gb: float | None = None  # on the device
    data_sheet_utilisation: float | None = None  # model FLOPs over the dense bf16 peak
    measured_utilisation: float | None = None  # over the matrix product measured in the same run
    data_wait_fraction: float | None = None


def circumstances(
    device: torch.device,
    *,
    script: str = "bench_train.py",
    packages: Sequence[str] = PACKAGES,
) -> Circumstances:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    # folders of this machine mean nothing elsewhere
    words = [re.sub(r"^(--\w+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    return Circumstances(
        date=datetime.now(UTC).date().isoformat(),
        commit=commit or "none",
        command=shlex.join(["python", f"benchmarks/{script}", *words]),
        device=device_name(device),
        driver=driver_version(device),
        versions=_versions(packages),
    )


def check_columns(path: Path, row: Any = Row) -> None:
    """Raise ValueError where `path` is a CSV file whose header is not that of `row`, a class."""
    columns = [column.name for column in fields(row)]
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != columns:
        raise ValueError(
            f"{path} has the columns {','.join(header)}, not {','.join(columns)}; "
            "choose another --output"
        )


def append_rows(path: Path, rows: Iterable[Circumstances]) -> None:
    """Append to the CSV file, which begins with a header; floats to four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        is_empty = not file.tell()
        for row in rows:
            if is_empty:
                writer.writerow([column.name for column in fields(row)])
                is_empty = False
            values = astuple(row)
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in values])


def _versions(packages: Sequence[str]) -> str:
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)
