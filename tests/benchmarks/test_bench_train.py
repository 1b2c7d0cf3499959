"""The training benchmark runs at tiny size, and what it counts is what `fit` does and counts."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cldf_dist.data.readers import datasets

TINY = (
    "--tiny",
    "--rounds",
    "1",
    "--steps",
    "2",
    "--warmup",
    "1",
    "--batch",
    "4",
    "--workers",
    "1",
)
OVERHEAD = {
    "floor: bytes of the moving average",
    "moving average",
    "means, finite check, skipped steps",
    "bare loop beside fit",
    "fit",
    "bare loop beside fit, MLflow",
    "fit, MLflow",
}
LADDER = {
    "eager fp32", "bf16", "bf16, channels_last", "bf16, fused AdamW", "fit, 1 loader processes",
}  # fmt: skip


@pytest.mark.slow
def test_cpu_part_runs_at_tiny_size_and_appends_its_rows(tmp_path, command):
    output = tmp_path / "train.csv"
    command("bench_train", *TINY, "--parts", "sizes", "overhead", "large", "--output", str(output))
    rows = _read(output)
    names = {row["implementation"] for row in rows}
    assert names == OVERHEAD | {"size of the net", "bare loop"}
    timed = [row for row in rows if row["implementation"] != "size of the net"]
    assert all(float(row["cpu_ms"]) > 0 for row in timed)
    for row in rows:
        is_fit = row["implementation"].startswith("fit")
        assert bool(row["over_bare_ms"]) == bool(row["over_bare_max_ms"]) == is_fit
    assert {row["config"] for row in rows} == {"configs/debug.yaml"}
    assert all(row["date"] and row["commit"] and row["device"] for row in rows)
    assert str(tmp_path) not in output.read_text()


@pytest.mark.slow
def test_ladder_runs_at_tiny_size_and_says_what_it_leaves_out(tmp_path, command, capsys):
    output = tmp_path / "train.csv"
    command("bench_train", *TINY, "--parts", "ladder", "--output", str(output))
    rows = _read(output)
    assert {row["implementation"] for row in rows} == LADDER
    for row in rows:
        seconds = float(row["device_ms"]) / 1000
        assert float(row["images_per_second"]) == pytest.approx(4 / seconds, rel=0.01)
        assert 0 < float(row["measured_utilisation"]) < 1
        assert row["data_sheet_utilisation"] == row["peak_gb"] == ""
        assert bool(row["data_wait_fraction"]) == row["implementation"].startswith("fit")
    printed = capsys.readouterr().out
    assert "xformers: left out, xformers needs a CUDA device" in printed
    assert "CUDA graphs: left out, torch.compile and CUDA graphs are measured on CUDA" in printed


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's, about torch itself
def test_ladder_runs_at_tiny_size_on_cuda(tmp_path, command):
    output = tmp_path / "train.csv"
    command("bench_train", *TINY, "--device", "cuda", "--output", str(output))
    rows = [row for row in _read(output) if row["device_ms"]]
    assert {"TF32", "bf16, compile, fused AdamW, CUDA graphs"} <= {
        row["implementation"] for row in rows
    }
    assert all(float(row["peak_gb"]) > 0 for row in rows)


def test_size_is_what_the_training_counts(module):
    """On a CPU too, where torch alone counts no attention."""
    from cldf_dist.training.throughput import Throughput

    cases = module("cases")
    config = cases.DEBUG.config()
    batch = module("made_up").batches_on(torch.device("cpu"), config, 1)[0]
    throughput = Throughput(torch.device("cpu"), None, 1)
    throughput.count(cases.make_task(config), batch, len(batch["image"]))
    throughput.start(0)
    speed = throughput.metrics(1, len(batch["image"]), 0.0)
    counted = 1000 * speed["speed/model_tflops"] / speed["speed/slices_per_second"]
    assert counted == pytest.approx(cases.size_of(config)["gflop_per_image"])


def test_guided_diffusion_sizes_are_those_of_the_paper(module):
    """Dhariwal and Nichol's 256x256 levels: 128 channels times 1, 1, 2, 2, 4, 4."""
    cases = module("cases")
    config = cases.GUIDED_DIFFUSION.config()
    levels = config.diffusion.net.channels
    assert [width // 128 for width in levels] == [1, 1, 2, 2, 4, 4]
    sides = [config.data.image_size >> level for level in range(len(levels))]
    attending = zip(sides, config.diffusion.net.attention_levels)
    assert [side for side, attends in attending if attends] == [16]
    assert len(datasets.channels(config.data)) == 4


def test_different_trainings_are_not_compared(tmp_path, module):
    """Were the bare loop to train something else, the difference of times would mean nothing."""
    cases = module("cases")
    config = cases.DEBUG.config(f"runs={tmp_path}", "tracking.enabled=false")
    first, second = cases.make_task(config), cases.make_task(replace(config, seed=1))
    module("bench_train").check_same_weights(first, cases.make_task(config))
    with pytest.raises(RuntimeError, match="trained different nets"):
        module("bench_train").check_same_weights(first, second)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device", "cuda", "--parts", "overhead"], "belong to --device cpu"),
        (["--steps", "0"], "--steps: must be > 0, got 0"),
    ],
)
def test_a_wrong_option_is_refused(words, reason, command, capsys):
    with pytest.raises(SystemExit):
        command("bench_train", *words)
    assert reason in capsys.readouterr().err


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
