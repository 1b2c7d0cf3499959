"""The benchmark runs as its documentation says, at tiny size; its floors and refusals are right."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "benchmarks"
HEADER = (
    "date,commit,command,device,driver,torch,triton,implementation,pass,N,D,precision,seconds,"
    "ratio_to_naive,times_floor,peak_extra_mb"
)
PNG_SIGNATURE = b"\x89PNG"


@pytest.mark.slow
def test_benchmark_runs_at_tiny_size_appends_its_rows_and_plots_them(tmp_path):
    output, plot = tmp_path / "contrast.csv", tmp_path / "contrast.png"
    words = ["--tiny", "--rounds", "1", "--output", str(output), f"--plot={plot}"]
    for _ in range(2):
        printed = _run(*words, "--features", "32", "64")
    assert "4 N^2 D FLOP" in printed
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
    rows = _read(output)
    assert output.read_text().splitlines().count(HEADER) == 1
    assert ",".join(rows[0]) == HEADER
    implementations = {"naive", "pytorch-metric-learning", "ours"}
    expected = {
        (name, part, size, features)
        for name in implementations
        for part in ("forward", "backward", "both")
        for size in ("64", "128")
        for features in ("32", "64")
    }
    found = [(row["implementation"], row["pass"], row["N"], row["D"]) for row in rows]
    assert set(found) == expected
    assert len(found) == 2 * len(expected)
    assert all(float(row["seconds"]) > 0 and float(row["times_floor"]) > 0 for row in rows)
    assert all(row["ratio_to_naive"] == "1" for row in rows if row["implementation"] == "naive")
    assert str(tmp_path) not in output.read_text()


def test_an_implementation_that_would_take_too_long_is_left_out_with_the_reason(tmp_path):
    output = tmp_path / "contrast.csv"
    words = ["--tiny", "--rounds", "1", "--implementations", "ours", "--output", str(output)]
    printed = _run(*words, "--max-seconds", "0")
    assert "ours: left out, it would take about" in printed
    rows = _read(output)
    assert {row["N"] for row in rows} == {"64"}
    assert all(row["ratio_to_naive"] == "" for row in rows)  # naive was not measured


@pytest.mark.slow
def test_compile_time_is_reported_and_not_counted(tmp_path):
    output = tmp_path / "contrast.csv"
    words = ["--pixels", "64", "--rounds", "1", "--output", str(output)]
    printed = _run(*words, "--implementations", "compiled naive")
    assert "s (wall) to compile, not counted" in printed
    assert all(float(row["seconds"]) < 1 for row in _read(output))


@pytest.mark.gpu
def test_benchmark_runs_at_tiny_size_on_cuda(tmp_path):
    output, plot = tmp_path / "contrast.csv", tmp_path / "contrast.png"
    words = ["--tiny", "--device", "cuda", "--precision", "fp16", "tf32", "--rounds", "1"]
    printed = _run(*words, "--output", str(output), "--plot", str(plot))
    assert "5 N^2 D FLOP" in printed
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
    rows = _read(output)
    assert {"ours fp16", "ours tf32", "ours deterministic"} <= {
        row["implementation"] for row in rows
    }
    assert all(row["driver"] for row in rows)


def test_published_rows_can_be_plotted(tmp_path, command):
    plot = tmp_path / "contrast.png"
    command("bench_contrast", "--plot-only", "--plot", str(plot))
    assert plot.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--plot-only"], "--plot-only needs --plot"),
        (["--tiny", "--pixels", "64"], "leave --pixels out"),
        (["--precision", "fp16"], "--precision belongs to --device cuda"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(words, reason, command, capsys):
    with pytest.raises(SystemExit):
        command("bench_contrast", *words)
    assert reason in capsys.readouterr().err


def test_the_latest_row_is_plotted_and_its_floor_is_seconds_over_times_floor(tmp_path, module):
    plot = module("contrast_plot")
    path = tmp_path / "contrast.csv"
    row = {"device": "GPU", "pass": "both", "N": 1024, "D": 64, "times_floor": 2}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER.split(","))
        writer.writeheader()
        for seconds, precision in [(9.0, "fp16"), (4.0, "fp16"), (6.0, "tf32")]:
            about = {"implementation": f"ours {precision}", "precision": precision}
            writer.writerow({**row, **about, "seconds": seconds})
    panels = plot.read_panels(path, "cuda", None)
    assert list(panels) == [("GPU", 64)]
    curves = panels["GPU", 64]
    assert float(curves["ours fp16"][1024]["seconds"]) == 4
    assert plot.lowest_floor(curves) == ({1024: 2.0}, "fp16")
    with pytest.raises(ValueError, match="no rows"):
        plot.read_panels(path, "cpu", None)


def test_floor_on_a_gpu_is_the_larger_of_products_and_exponentials_of_each_pass(module):
    ceilings = module("contrast_floor").Ceilings(True, {"fp16": 8e14}, 4e12)
    forward, backward, both = ceilings.floors(2**16, 64, "fp16")
    pairs = 2**32
    assert forward == pytest.approx(pairs / 2 / 4e12)  # exp
    assert backward == pytest.approx(4 * pairs * 64 / 8e14)  # products
    assert both == pytest.approx(forward + backward)


def test_floor_on_cpu_is_the_sum_of_products_and_exponentials(module):
    ceilings = module("contrast_floor").Ceilings(False, {"fp32": 1e11}, 1e9)
    floors = ceilings.floors(1000, 50, "fp32")
    assert floors == pytest.approx([0.0005 + 0.0005, 0.0015 + 0.0005, 0.003])


def test_what_needs_more_memory_than_is_free_is_left_out_with_the_reason(module, capsys):
    bench, cpu = module("bench_contrast"), torch.device("cpu")
    found = bench.find_implementations(["naive", "ours"], cpu, [])
    selected = bench.select(found, 2**24, bench.Plan(cpu, 1, 1.0))
    assert [implementation.name for implementation in selected] == ["ours"]
    assert "naive: left out, its N x N matrices need about" in capsys.readouterr().out


def test_running_out_of_memory_leaves_one_implementation_out_and_other_errors_surface(
    module, capsys
):
    def exhausted(z: Tensor, labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(z: Tensor, labels: Tensor) -> Tensor:
        raise ValueError("broken")

    bench, cpu = module("bench_contrast"), torch.device("cpu")
    plan = bench.Plan(cpu, 1, 1.0)
    found = bench.find_implementations(["ours"], cpu, [])
    both = [bench.Implementation("exhausted", exhausted), *found]
    measured = bench.measure(both, 16, 4, plan)
    assert [one.name for one in measured] == ["ours"]
    assert "exhausted: left out, out of memory: CUDA out of memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="broken"):
        bench.measure([bench.Implementation("broken", broken)], 16, 4, plan)
    bench.measure([bench.Implementation("broken", broken, is_compiled=True)], 16, 4, plan)
    assert "broken: left out, torch.compile failed: broken" in capsys.readouterr().out


def _run(*words: str) -> str:
    command = [sys.executable, str(FOLDER / "bench_contrast.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
