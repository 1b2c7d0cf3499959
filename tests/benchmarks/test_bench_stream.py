"""The benchmark of the stream runs as its documentation says, at tiny size."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--slices=32", "--channels=2", "--image-size=16", "--slices-per-shard=8", "--rounds=1"]
HEADER = (
    "date,commit,command,device,versions,implementation,pages,slices,channels,image_size,"
    "file_bytes,cpu_ms,ratio_to_floor,wall_ms"
)


@pytest.mark.slow
def test_benchmark_runs_at_tiny_size_and_appends_its_rows(tmp_path: Path) -> None:
    output = tmp_path / "stream.csv"
    output.write_text(f"{HEADER}\n")
    printed = _run(*TINY, f"--output={output}", f"--folder={tmp_path}")
    tars_of = "read() of the tars"
    assert "LitData: left out" in printed or importlib.util.find_spec("litdata")
    assert "bytes per slice of (2, 16, 16)" in printed
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert output.read_text().splitlines().count(HEADER) == 1
    assert ",".join(rows[0]) == HEADER
    warm = {row["implementation"] for row in rows if row["pages"] == "warm"}
    assert {tars_of, "webdataset", "npy files", "ours", "ours, float32 batches"} <= warm
    assert all(row["ratio_to_floor"] == "1" for row in rows if row["implementation"] == tars_of)
    assert all(float(row["cpu_ms"]) > 0 and int(row["file_bytes"]) >= 1024 for row in rows)
    assert str(tmp_path) not in output.read_text()
    assert list(tmp_path.iterdir()) == [output]


def test_published_rows_have_their_circumstances() -> None:
    with (FOLDER / "results" / "stream.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row[name] for row in rows for name in HEADER.split(","))


def _run(*words: str) -> str:
    command = [sys.executable, str(FOLDER / "bench_stream.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
