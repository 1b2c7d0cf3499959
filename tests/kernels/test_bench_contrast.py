"""The benchmark runs as its documentation says, at tiny size."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_contrast.py"


def test_benchmark_runs_at_tiny_size_and_appends_its_rows(tmp_path):
    output = tmp_path / "contrast.csv"
    command = [sys.executable, str(BENCHMARK), "--tiny", "--rounds", "1", "--output", str(output)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "floor 4 N^2 D" in finished.stdout
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {"naive", "tiled"} <= {row["implementation"] for row in rows}
    columns = "date commit command device torch implementation N D seconds ratio_to_naive"
    assert list(rows[0]) == [*columns.split(), "peak_extra_mb"]
    assert all(float(row["seconds"]) > 0 for row in rows)
