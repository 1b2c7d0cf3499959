"""Processor time to read slices: ours against other formats and the floor, reading the bytes.

One process, alternating rounds, each cold (pages dropped from memory first) and warm; medians
count. Every reader gives the same int16 slices, ours with its crc32c verified; one more row is
what a training gets from it, float32 batches. One CSV row per reader and state is appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py
    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py --slices 2048 --image-size 128
"""

import argparse
import csv
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from contrast_device import device_name
from stream_readers import COLD, FLOOR, WARM, Reader, Sizes, make_readers

RESULTS = Path(__file__).parent / "results" / "stream.csv"
PACKAGES = ("numpy", "torch", "webdataset", "litdata", "google-crc32c")


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times and bytes are per slice."""

    date: str
    commit: str
    command: str
    device: str
    versions: str
    implementation: str
    pages: str  # cold or warm
    slices: int
    channels: int
    image_size: int
    file_bytes: int
    cpu_ms: float  # user and system
    ratio_to_floor: float
    wall_ms: float


COLUMNS = [column.name for column in fields(Row)]


def main() -> None:
    """Write the slices in every form, measure, append the rows."""
    arguments = _parse_arguments()
    try:
        _check_columns(arguments.output)
    except ValueError as error:
        sys.exit(f"bench_stream.py: {error}")
    torch.set_num_threads(1)
    sizes = Sizes(
        arguments.slices, arguments.channels, arguments.image_size, arguments.slices_per_shard
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        readers = make_readers(Path(folder), sizes)
        floor = readers[0]
        print(f"floor: {floor.num_bytes / sizes.num_slices:.0f} bytes per slice of {sizes.shape}")
        states = _measure(readers, arguments.rounds)
        rows = [row for state in states for row in _rows(readers, state, sizes)]
    _print_table(rows)
    _append(arguments.output, rows)
    print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default, what in (
        ("slices", 512, "how many; multiples of 32 fill every batch"),
        ("channels", 4, "of a slice"),
        ("image-size", 224, "pixels"),
        ("slices-per-shard", 64, "and per chunk of LitData"),
        ("rounds", 9, "of which the median counts"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default %(default)s"
        )
    parser.add_argument("--folder", type=Path, help="where the slices are written, then removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name in ("slices", "channels", "image_size", "slices_per_shard", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1")
    return arguments


def _measure(readers: list[Reader], rounds: int) -> list[str]:
    """Fill the readers' seconds; the states that could be measured, of the floor at least."""
    forgetful = [reader.name for reader in readers if reader.forget_pages()]
    if FLOOR not in forgetful:
        forgetful = []  # nothing to compare with
    for reader in readers:
        if reader.name not in forgetful:
            print(f"{reader.name}, cold: left out, its pages cannot be dropped from memory")
        reader.start()()  # into memory, and every cache of the libraries filled
    for _ in range(rounds):
        for reader in readers:
            if reader.name in forgetful and reader.forget_pages():
                reader.measure(COLD)
            reader.measure(WARM)
    return [COLD, WARM] if forgetful else [WARM]


def _rows(readers: list[Reader], state: str, sizes: Sizes) -> list[Row]:
    floor_cpu, _ = readers[0].medians(state)
    rows = []
    for reader in readers:
        if state not in reader.seconds:
            continue
        cpu, wall = reader.medians(state)
        rows.append(
            Row(
                date=datetime.now(UTC).date().isoformat(),
                commit=_commit(),
                command=_command(),
                device=device_name(torch.device("cpu")),
                versions=_versions(),
                implementation=reader.name,
                pages=state,
                slices=sizes.num_slices,
                channels=sizes.num_channels,
                image_size=sizes.image_size,
                file_bytes=round(reader.num_bytes / sizes.num_slices),
                cpu_ms=_round(1000 * cpu / sizes.num_slices),
                ratio_to_floor=_round(cpu / floor_cpu),
                wall_ms=_round(1000 * wall / sizes.num_slices),
            )
        )
    return rows


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "none"


def _command() -> str:
    # folders of this machine mean nothing elsewhere
    words = [re.sub(r"^(--\w+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/bench_stream.py", *words])


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _print_table(rows: list[Row]) -> None:
    print(f"\n{'per slice:':<24}{'':>6}{'CPU ms':>10}{'x floor':>10}{'wall ms':>10}{'bytes':>10}")
    for row in rows:
        times = f"{row.cpu_ms:>10.4f}{row.ratio_to_floor:>10.2f}{row.wall_ms:>10.4f}"
        print(f"{row.implementation:<24}{row.pages:>6}{times}{row.file_bytes:>10}")


def _check_columns(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != COLUMNS:
        raise ValueError(
            f"{path} has the columns {','.join(header)}, not {','.join(COLUMNS)}; "
            "choose another --output"
        )


def _append(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in rows)


if __name__ == "__main__":
    main()
