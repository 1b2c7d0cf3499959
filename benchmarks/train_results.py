"""The rows of the training benchmark: what they share, and the CSV file they are appended to."""

import csv
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    data_wait_share: float | None = None


COLUMNS = [column.name for column in fields(Row)]


def circumstances(device: torch.device) -> Circumstances:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    # folders of this machine mean nothing elsewhere
    words = [re.sub(r"^(--\w+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    return Circumstances(
        date=datetime.now(UTC).date().isoformat(),
        commit=commit or "none",
        command=shlex.join(["python", "benchmarks/bench_train.py", *words]),
        device=device_name(device),
        driver=driver_version(device),
        versions=_versions(),
    )


def check_columns(path: Path) -> None:
    """Raise ValueError where `path` is a CSV file whose header is not that of Row."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != COLUMNS:
        raise ValueError(
            f"{path} has the columns {','.join(header)}, not {','.join(COLUMNS)}; "
            "choose another --output"
        )


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append to the CSV file, which begins with a header; floats to four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        for row in rows:
            values = astuple(row)
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in values])


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)
