"""The benchmark runs as its documentation says, at tiny size; its floors and refusals are right."""

import csv
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
    assert all(row["ratio_to_naive"] == "1.0" for row in rows if row["implementation"] == "naive")
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
    command("--plot-only", "--plot", str(plot))
    assert plot.read_bytes().startswith(PNG_SIGNATURE)


def test_a_file_with_other_columns_is_refused_and_left_as_it_is(tmp_path, command):
    output = tmp_path / "contrast.csv"
    output.write_text("date,seconds\n2026-01-01,1\n")
    with pytest.raises(SystemExit, match=r"has the columns date,seconds, not .*; choose another"):
        command("--tiny", "--output", str(output))
    assert output.read_text() == "date,seconds\n2026-01-01,1\n"


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
        command(*words)
    assert reason in capsys.readouterr().err


def test_the_latest_row_is_plotted_and_its_floor_is_seconds_over_times_floor(tmp_path, modules):
    results = modules["contrast_results"]
    path = tmp_path / "contrast.csv"
    for seconds, precision in [(9.0, "fp16"), (4.0, "fp16"), (6.0, "tf32")]:
        row = _row(results, implementation=f"ours {precision}", precision=precision)
        results.append_rows(path, [results.Row(**{**row, "seconds": seconds})])
    (panel,) = results.read_panels(path, device_type="cuda", features=None)
    assert panel.curves["ours fp16"][1024].seconds == 4
    assert panel.floor() == ({1024: 2.0}, "fp16")
    with pytest.raises(ValueError, match="no rows"):
        results.read_panels(path, device_type="cpu", features=None)


def test_floor_on_a_gpu_is_the_larger_of_products_and_exponentials_of_each_pass(modules):
    ceilings = modules["contrast_device"].Ceilings(True, {"fp16": 8e14}, 4e12, "")
    floors = ceilings.floor_seconds(2**16, 64, "fp16")
    pairs = 2**32
    assert floors["forward"] == pytest.approx(pairs / 2 / 4e12)  # exp
    assert floors["backward"] == pytest.approx(4 * pairs * 64 / 8e14)  # products
    assert floors["both"] == pytest.approx(floors["forward"] + floors["backward"])


def test_floor_on_cpu_is_the_sum_of_products_and_exponentials(modules):
    ceilings = modules["contrast_device"].Ceilings(False, {"fp32": 1e11}, 1e9, "")
    floors = ceilings.floor_seconds(1000, 50, "fp32")
    assert floors["forward"] == pytest.approx(0.0005 + 0.0005)
    assert floors["backward"] == pytest.approx(0.0015 + 0.0005)
    assert floors["both"] == pytest.approx(0.003)


def test_what_needs_more_memory_than_is_free_is_left_out_with_the_reason(modules, capsys):
    compared, cpu = modules["contrast_implementations"], torch.device("cpu")
    found = compared.find_implementations(["naive", "ours"], cpu, [])
    selected = compared.select(found, 2**24, {}, compared.Plan(cpu, 1, 1.0))
    assert [implementation.name for implementation in selected] == ["ours"]
    assert "naive: left out, its N x N matrices need about" in capsys.readouterr().out


def test_running_out_of_memory_leaves_one_implementation_out_and_other_errors_surface(
    modules, capsys
):
    def exhausted(z: Tensor, labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(z: Tensor, labels: Tensor) -> Tensor:
        raise ValueError("broken")

    compared, cpu = modules["contrast_implementations"], torch.device("cpu")
    plan = compared.Plan(cpu, 1, 1.0)
    found = compared.find_implementations(["ours"], cpu, [])
    both = [compared.Implementation("exhausted", exhausted), *found]
    measured = compared.measure(both, 16, 4, plan)
    assert [one.implementation.name for one in measured] == ["ours"]
    assert "exhausted: left out, out of memory: CUDA out of memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="broken"):
        compared.measure([compared.Implementation("broken", broken)], 16, 4, plan)
    compared.measure([compared.Implementation("broken", broken, is_compiled=True)], 16, 4, plan)
    assert "broken: left out, torch.compile failed: broken" in capsys.readouterr().out


@pytest.fixture
def modules(monkeypatch) -> dict[str, ModuleType]:
    """The files of the benchmark, imported as the script does."""
    monkeypatch.syspath_prepend(FOLDER)
    import bench_contrast
    import contrast_device
    import contrast_implementations
    import contrast_results

    modules = [bench_contrast, contrast_device, contrast_implementations, contrast_results]
    return {module.__name__: module for module in modules}


@pytest.fixture
def command(modules, monkeypatch):
    """Run the benchmark's command line in this process."""

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_contrast.py", *words])
        modules["bench_contrast"].main()

    return run


def _run(*words: str) -> str:
    command = [sys.executable, str(FOLDER / "bench_contrast.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _row(results: ModuleType, **changes: object) -> dict[str, object]:
    texts = dict.fromkeys(("date", "commit", "command", "driver", "torch", "triton"), "")
    numbers = {"N": 1024, "D": 64, "ratio_to_naive": None, "times_floor": 2, "peak_extra_mb": 0}
    return {**texts, **numbers, "device": "GPU", "pass_": "both", **changes}
