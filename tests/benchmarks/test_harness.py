"""What all benchmarks share: files of rows that stay readable, and options that are checked."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = {
    "bench_cache": ["--tiny"],
    "bench_contrast": ["--tiny"],
    "bench_decode": ["--tiny"],
    "bench_scaling": ["--tiny"],
    "bench_stages": [],
    "bench_start": [],
    "bench_stream": [],
    "bench_train": ["--tiny"],
    "phantom_check": ["--tiny"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_rows_have_the_columns_of_the_benchmark(script, module):
    path = FOLDER / "results" / f"{script.removeprefix('bench_')}.csv"
    module("harness").check_columns(path, module(script).COLUMNS)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["date"] and row["commit"] for row in rows)


@pytest.mark.parametrize(("script", "words"), SCRIPTS.items())
def test_a_file_with_other_columns_is_refused_and_left_as_it_is(script, words, tmp_path, command):
    output = tmp_path / "rows.csv"
    output.write_text("date,seconds\n2026-01-01,1\n")
    with pytest.raises(SystemExit, match=r"has the columns date,seconds, not .*; choose another"):
        command(script, *words, "--output", str(output))
    assert output.read_text() == "date,seconds\n2026-01-01,1\n"


def test_rows_hold_what_a_reader_elsewhere_needs(tmp_path, module, monkeypatch):
    """Device, versions, date and commit; no folder of this machine; floats in four digits."""
    harness = module("harness")
    columns = (*harness.ABOUT, "what", "seconds", "rounds", "ratio")
    output = tmp_path / "rows.csv"
    words = ["bench_it.py", f"--output={output}", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        bench = harness.Benchmark("bench_it.py", "Doc.", columns, packages=("torch", "no-package"))
        bench.shared_options("folder")
        bench.parse()
        bench.begin()
        bench.add(what="work", seconds=0.123456, rounds=3)
    first, second = csv.DictReader(output.read_text().splitlines())
    assert first == second
    assert first["command"].startswith("python benchmarks/bench_it.py --output=")
    assert str(tmp_path) not in output.read_text()
    assert first["device"].startswith("CPU, 1 thread (")
    assert f"torch {torch.__version__}" in first["versions"]
    assert "no-package" not in first["versions"]
    assert first["date"]
    assert first["commit"]
    assert (first["seconds"], first["rounds"], first["ratio"]) == ("0.1235", "3", "")
    with pytest.raises(ValueError, match="no column other"):
        bench.add(other=1)


def test_contestants_take_turns_and_the_warm_up_is_not_kept(module):
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in ("one", "two")}
    assert module("measure").alternate(calls, rounds=2, warmup=1) == {"one": [3, 5], "two": [4, 6]}
    assert order == ["one", "two"] * 3


def test_peak_is_what_a_call_holds_above_what_was_there(module):
    """Tens of megabytes, so that the noise of the resident memory does not matter."""
    measure = module("measure")
    size = 64 * 2**20 // 4
    large, none = measure.peaks_mb(measure.CPU, lambda: torch.ones(size), lambda: None)
    if math.isnan(large):
        pytest.skip("the high-water mark cannot be reset here")
    assert 60 < large < 100
    assert none < 30
