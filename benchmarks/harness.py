"""What every benchmark shares: its command line, and its rows in a CSV file.

A benchmark is its work and its peers: it measures (`measure.py`), and hands each result to
`Benchmark.add`, which knows the circumstances of the run.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from measure import CPU

RESULTS = Path(__file__).parent / "results"
ABOUT = ("date", "commit", "command", "device", "driver", "versions")  # first columns of most files


class Benchmark:
    """One script: its options, and the CSV file that its rows are appended to.

    `columns` are those of the file, in its order. Those of ABOUT (and `torch` and `triton`, their
    versions) are filled in here; what a row does not name stays empty.
    """

    def __init__(
        self, script: str, doc: str | None, columns: Sequence[str], packages: Sequence[str] = ()
    ) -> None:
        self.script, self.columns, self._packages = Path(script).name, tuple(columns), packages
        self.parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
        path = RESULTS / f"{Path(script).stem.removeprefix('bench_')}.csv"
        self.option("--output", type=Path, default=path, help="CSV file to append to")
        self.arguments = argparse.Namespace()
        self.device = CPU
        self.about: dict[str, str] = {}
        self._num_rows = 0

    def option(self, name: str, **words: Any) -> None:
        self.parser.add_argument(name, **words)

    def numbers(self, kind: type = int, **defaults: tuple[float, str]) -> None:
        """Options that must be > 0: each with its default and what it means."""
        for name, (default, meaning) in defaults.items():
            self.option(
                f"--{name.replace('_', '-')}",
                type=positive(kind),
                default=default,
                metavar="N",
                help=f"{meaning}; default %(default)s",
            )

    def shared_options(self, *names: str) -> None:
        """Those that mean the same in several benchmarks."""
        known: dict[str, dict[str, Any]] = {
            "device": {"choices": ("cpu", "cuda"), "default": "cpu"},
            "tiny": {"action": "store_true", "help": "sizes that only show that it runs"},
            "folder": {"type": Path, "help": "where files are written, then removed"},
        }
        for name in names:
            self.option(f"--{name}", **known[name])

    def parse(self) -> argparse.Namespace:
        """The arguments; ends the program where the file has other columns."""
        self.arguments = self.parser.parse_args()
        try:
            check_columns(self.arguments.output, self.columns)
        except ValueError as error:
            sys.exit(f"{self.script}: {error}")
        return self.arguments

    def begin(self, device: torch.device | None = None) -> None:
        """Settle the device, by default that of --device, and the circumstances of all rows."""
        name = getattr(self.arguments, "device", "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            self.parser.error("--device cuda: torch sees no CUDA device")
        if device is None:
            device = torch.device(name, torch.cuda.current_device()) if name == "cuda" else CPU
        if device.type == "cpu":
            torch.set_num_threads(1)
        self.device = device
        # folders of this machine mean nothing elsewhere
        words = [re.sub(r"^(--\w+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
        self.about = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "command": shlex.join(["python", f"benchmarks/{self.script}", *words]),
            "device": device_name(device),
            "driver": ask_nvidia_smi("driver_version") if device.type == "cuda" else "",
            "versions": _versions(self._packages),
            "torch": torch.__version__,
            "triton": _version("triton"),
        }
        print(f"{self.about['device']}; {self.about['versions'] or torch.__version__}", flush=True)

    def add(self, **values: Any) -> dict[str, Any]:
        """Print a row and append it, floats to four significant digits."""
        row = {name: value for name, value in self.about.items() if name in self.columns} | values
        if unknown := set(row) - set(self.columns):
            raise ValueError(f"{self.script} has no column {', '.join(sorted(unknown))}")
        path = self.arguments.output
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow({name: _rounded(value) for name, value in row.items()})
        if not self._num_rows:
            print(f"rows are appended to {path}")
        self._num_rows += 1
        texts = [value for value in values.values() if isinstance(value, str) and value]
        numbers = [
            f"{name} {_rounded(value)}"
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        print(f"{': '.join(texts)}: {', '.join(numbers)}", flush=True)
        return row

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for what is written, inside --folder; removed at the end."""
        with tempfile.TemporaryDirectory(dir=self.arguments.folder) as folder:
            yield Path(folder)

    def run_parts(self, parts: Mapping[str, Callable[["Benchmark", Path], None]]) -> None:
        """Those of --parts, each in a folder of its own."""
        for part in self.arguments.parts:
            with self.folder() as folder:
                parts[part](self, folder)


def positive(kind: type) -> Callable[[str], Any]:
    """A type of argparse: numbers above zero."""

    def number(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
        return value

    return number


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError where `path` is a CSV file with another header."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != list(columns):
        raise ValueError(
            f"{path} has the columns {','.join(header)}, not {','.join(columns)}; "
            "choose another --output"
        )


def device_name(device: torch.device) -> str:
    """The model, as the CSV names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, 1 thread ({model})"


def ask_nvidia_smi(field: str, *words: str) -> str:
    """One property of the first device asked for, no unit; empty where there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *words]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "none"


def _versions(packages: Sequence[str]) -> str:
    found = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    return " ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
