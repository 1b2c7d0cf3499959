"""The benchmark of the stages runs at tiny size, and its hours are steps times seconds."""

import csv

import pytest
import torch

TINY = (
    *("--config", "configs/debug.yaml", "--seconds", "0.2", "--rounds", "2"),
    *("--workers", "0", "--cached-slices", "8", "--train-slices", "60"),
    *("--local-batches", "2", "4"),
)
MEASURED = {
    ("train-diffusion", "fit"): 6,
    ("train-diffusion", "fit, local batch 2"): 0,
    ("tune-label-embedding", "fit"): 6,
    ("train-classifier", "fit"): 6,
    ("train-cam", "fit"): 6,
    ("train-patch-classifier", "fit"): 6,
    # of 60 / (1 - 0.15 - 0.25) = 100 slices, in batches of 8 and of 16
    ("cache", "one batch"): 10,
    # cldf, cldf_plus and their upper bounds, and the control of cldf_plus
    ("train-decoder", "fit, 0 loaders"): 5 * 6,
    ("segment", "cldf"): 3,
    ("segment", "all rows"): 3,
}


@pytest.mark.slow
def test_benchmark_runs_at_tiny_size_and_appends_its_rows(tmp_path, command, capsys):
    output = tmp_path / "stages.csv"
    command("bench_stages", *TINY, "--folder", str(tmp_path), "--output", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["stage"], row["what"]): int(row["units"] or 0) for row in rows} == MEASURED
    for row in rows:
        milliseconds = float(row["unit_ms"])
        assert float(row["unit_min_ms"]) <= milliseconds <= float(row["unit_max_ms"])
        rate = 1000 * int(row["batch_size"]) / milliseconds
        assert float(row["slices_per_second"]) == pytest.approx(rate, rel=0.01)
        hours = int(row["units"] or 0) * milliseconds / 3.6e6
        assert float(row["hours"] or 0) == pytest.approx(hours, rel=0.01)
        assert float(row["peak_gb"]) > 0
        assert bool(row["parameters"]) == row["stage"].startswith(("train", "tune"))
        assert bool(row["cache_mb_per_slice"]) == (row["stage"] == "cache")
    assert str(tmp_path) not in output.read_text()
    assert list(tmp_path.iterdir()) == [output], "what was written is removed"
    assert "all of these" in capsys.readouterr().out


@pytest.mark.gpu
def test_benchmark_runs_at_tiny_size_on_cuda(tmp_path, command):
    output = tmp_path / "stages.csv"
    command("bench_stages", *TINY, "--output", str(output))
    with output.open() as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert rows["train-diffusion"]["precision"] == "bfloat16"
    assert rows["tune-label-embedding"]["precision"] == "tf32"
    assert all(0 < float(row["peak_gb"]) < 10 for row in rows.values())


def test_batch_that_does_not_fit_is_split_until_it_does(module, monkeypatch):
    """Measured is the step of the whole batch, not of a smaller one."""
    work = module("stage_work")
    training = work.trainings_of_slices(module("cases").DEBUG.config())[0]
    tried = []

    def measured(config, plan, num_micro_batches):
        tried.append(num_micro_batches)
        if num_micro_batches < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return num_micro_batches

    monkeypatch.setattr(work.Training, "measure", lambda _, *arguments: measured(*arguments))
    plan = work.Plan(torch.device("cpu"), 1.0, 1)
    assert training.measure_fitting(None, plan) == (4, 4)
    assert tried == [1, 2, 4]


def test_work_that_takes_longer_than_the_time_is_measured_once(module):
    work = module("stage_work")
    calls = []
    plan = work.Plan(torch.device("cpu"), 1e-9, 5)
    speed = work.measure_call(lambda: calls.append(1), plan, warmup=3)
    assert len(calls) == 3 + 1
    assert speed.num_rounds == 1
    assert 0 < speed.seconds == speed.fastest == speed.slowest


def test_rounds_share_the_time_out(module, monkeypatch):
    """A call takes a tenth of a second: of one second, each of two rounds gets five calls."""
    work = module("stage_work")
    calls = []
    monkeypatch.setattr(work.time, "perf_counter", lambda: 0.1 * len(calls))
    plan = work.Plan(torch.device("cpu"), 1.0, 2)
    speed = work.measure_call(lambda: calls.append(1), plan, warmup=1)
    assert len(calls) == 1 + 1 + 2 * 5, "the warm-up, the call that tells, two rounds"
    assert speed.num_rounds == 2
    assert speed.seconds == pytest.approx(0.1)


@pytest.mark.parametrize("word", ["--seconds=0", "--rounds=-1", "--train-slices=0"])
def test_a_wrong_option_is_refused(word, command, capsys):
    with pytest.raises(SystemExit):
        command("bench_stages", word)
    assert "must be > 0, got" in capsys.readouterr().err
