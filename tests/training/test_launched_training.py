"""The tiny training under `accelerate launch`, with the files of configs/accelerate/."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "trainings" / "tiny.py")

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.slow


def launch(start: Start, file: str, runs: Path, *scenarios: str) -> "subprocess.Popen[str]":
    """Two ranks, in a process group of their own as a terminal would make it."""
    config = str(ROOT / "configs" / "accelerate" / file)
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    on_cpu = {} if file.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    return start(*words, TINY, str(runs), *scenarios, start_new_session=True, **on_cpu)


def checkpoint(runs: Path, name: str, step: int = 9) -> dict[str, torch.Tensor]:
    folder = runs / name / "train-test" / "checkpoints" / f"step-{step:08d}"
    return {
        f"{group}/{key}": value
        for group in ("task", "average", "optimizer")
        for key, value in load_file(folder / f"{group}.safetensors").items()
    }


def assert_same(runs: Path, one: str, other: str) -> None:
    mine, theirs = checkpoint(runs, one), checkpoint(runs, other)
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def steps_done(runs: Path, name: str) -> int:
    path = runs / name / "train-test" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("file", ["zero1.yaml", "zero2.yaml"])
def test_two_ranks_with_zero_train_stop_and_resume(start: Start, tmp_path: Path, file: str) -> None:
    scenarios = ("whole", "stopped term=4 victim=1", "stopped")
    process = launch(start, file, tmp_path, *scenarios)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-5000:]
    assert output.count("finished") == 4
    assert len(re.findall(r"rank \d: stopped by SIGTERM after step [56], all saved", output)) == 2
    assert_same(tmp_path, "whole", "stopped")
    import deepspeed  # noqa: F401  # it is what ran

    assert "optimizer" in {path.stem for path in (tmp_path / "whole").rglob("*.safetensors")}


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(
    start: Start, tmp_path: Path
) -> None:
    started = time.monotonic()
    process = launch(start, "cpu.yaml", tmp_path, "whole", "killed kill=4 victim=1")
    output, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert output.count("finished") == 2, errors[-5000:]
    assert time.monotonic() - started < 240
    process = launch(start, "cpu.yaml", tmp_path, "killed")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-5000:]
    assert "resuming after step 3" in errors
    assert_same(tmp_path, "whole", "killed")


def test_ctrl_c_in_the_terminal_saves_and_a_second_one_stops_at_once(
    start: Start, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """The terminal tells the launcher, which tells its ranks."""
    many = "steps=100000 log_every=1 validate_every=0 checkpoint_every=100000"
    process = launch(start, "cpu.yaml", tmp_path, f"saved {many}")
    wait_until(lambda: steps_done(tmp_path, "saved") > 3, process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    (saved,) = (tmp_path / "saved" / "train-test" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) > 3
    assert not (tmp_path / "saved" / "train-test" / "DONE").exists()

    process = launch(start, "cpu.yaml", tmp_path, f"hung {many} hang=5")
    wait_until(lambda: steps_done(tmp_path, "hung") >= 5, process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None, "the first one waits for the step"
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - pressed < 25, "before the launcher's own patience of 30 s ends"
    assert not (tmp_path / "hung" / "train-test" / "checkpoints").exists()


def test_zero_with_the_variable_that_switches_it_off_is_an_error(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    on = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    done = subprocess.run(
        [sys.executable, TINY, str(tmp_path), "any"],
        env={**environment, **on},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert "ACCELERATE_USE_CPU disables DeepSpeed silently; unset it" in done.stdout
