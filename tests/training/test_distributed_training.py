"""Trainings on one and two ranks, with and without ZeRO, killed at any moment: all end alike.

Most of them are started by fork (`trainings/forked.py`), where torch is imported once; those under
accelerate's launcher are in `test_launched_training.py`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

FORKED = Path(__file__).parents[1] / "trainings" / "forked.py"
STEPS, BATCH = 9, 12

Starts = Callable[..., list[dict[str, Any]]]
pytestmark = pytest.mark.slow


def one(*scenarios: str) -> dict[str, Any]:
    return {"ranks": 1, "scenarios": list(scenarios)}


def two(*scenarios: str, zero: int = 0) -> dict[str, Any]:
    return {"ranks": 2, "zero": zero, "scenarios": list(scenarios)}


@pytest.fixture(scope="module")
def starts(environment: dict[str, str]) -> Starts:
    """Run described starts one after the other; how each ended."""

    def run(runs: Path, *described: dict[str, Any]) -> list[dict[str, Any]]:
        runs.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(FORKED), str(runs), json.dumps(described)],
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def stage(runs: Path, name: str) -> Path:
    return runs / name / "train-test"


def tensors(runs: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = stage(runs, name) / "checkpoints" / f"step-{step:08d}"
    return {
        f"{group}/{key}": value
        for group in ("task", "average", "optimizer")
        for key, value in load_file(folder / f"{group}.safetensors").items()
    }


def metrics(runs: Path, name: str) -> list[dict[str, float]]:
    """What was logged, without what depends on the clock."""
    lines = (stage(runs, name) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if k != "time" and "speed/" not in k} for line in found]


def samples(runs: Path, name: str) -> dict[int, int]:
    """Sample number -> position of the training samples that any rank read, in any start."""
    found: dict[int, int] = {}
    for path in stage(runs, name).glob("samples_rank*.txt"):
        for line in path.read_text().splitlines():
            number, position = map(int, line.split())
            assert found.setdefault(number, position) == position, "a number is one sample for good"
    return found


def assert_same(runs: Path, one_name: str, other: str, tolerance: float = 0.0) -> None:
    mine, theirs = tensors(runs, one_name), tensors(runs, other)
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        if tolerance:
            torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(value, theirs[key]), key
    if not tolerance:
        assert metrics(runs, one_name) == metrics(runs, other)
    assert samples(runs, one_name) == samples(runs, other)
    assert set(range(STEPS * BATCH)) == set(samples(runs, one_name))


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_killed_at_any_step_it_ends_as_if_it_had_not_been(
    tmp_path: Path, starts: Starts, ranks: int, zero: int
) -> None:
    """SIGKILL of either rank: losses, weights, average, optimizer and samples to the last bit."""
    steps = range(1, STEPS) if ranks == 1 else (1, 4, 8) if not zero else (5,)
    described = [{"ranks": ranks, "zero": zero, "scenarios": ["whole"]}]
    for step in steps:
        victim = step % ranks
        words = [f"killed-{step} kill={step} victim={victim}", f"killed-{step}"]
        described += [{"ranks": ranks, "zero": zero, "scenarios": [word]} for word in words]
    whole, *others = starts(tmp_path, *described)
    assert whole["codes"] == [0] * ranks, whole["output"]
    for step, killed, resumed in zip(steps, others[::2], others[1::2]):
        assert killed["codes"][step % ranks] == -9, killed["output"]
        assert None not in killed["codes"], "the other rank does not hang"
        assert 0 not in killed["codes"]
        assert resumed["codes"] == [0] * ranks, resumed["output"]
        assert_same(tmp_path, "whole", f"killed-{step}")


def test_a_training_goes_on_with_another_number_of_ranks_with_or_without_zero(
    tmp_path: Path, starts: Starts
) -> None:
    """The same samples in the same order; weights and optimizer equal up to round-off."""
    same = "dropout=0.0 accumulate=1 learning_rate=0.01"
    found = starts(
        tmp_path,
        one(f"alone {same}"),
        two(f"shared {same}"),
        two(f"sharded {same}", zero=2),
        two(f"moved {same} term=3 victim=1"),  # two ranks, then ZeRO-1, then one, then ZeRO-2
        two(f"moved {same} term=5 victim=0", zero=1),
        one(f"moved {same} term=6"),
        two(f"moved {same}", zero=2),
    )
    assert [start["codes"] for start in found] == [
        *([0], [0, 0], [0, 0]),
        *([0, 0], [0, 0], [0], [0, 0]),
    ], [start["output"] for start in found]
    resumed = [line for start in found for line in start["output"].splitlines() if "resum" in line]
    assert [int(line.rsplit(" ", 1)[1]) for line in resumed] == [5, 7, 8] or len(resumed) == 3
    for name in ("shared", "sharded", "moved"):
        assert samples(tmp_path, name) == samples(tmp_path, "alone")
    # batch norm sees a rank's share of the batch: one rank is another experiment there
    assert_same(tmp_path, "shared", "sharded", tolerance=1e-4)


def test_several_trainings_in_one_process_and_a_stop_asked_of_any_rank(
    tmp_path: Path, starts: Starts
) -> None:
    """As `cldf run` does; SIGTERM or SIGUSR1 to one rank stops all of them within two steps."""
    for zero in (0, 2):
        name = f"zero{zero}"
        (found,) = starts(
            tmp_path,
            two(
                f"{name}-whole",
                f"{name}-stopped term=4 victim=1",
                f"{name}-stopped usr1=6 victim=0",
                f"{name}-stopped",
                zero=zero,
            ),
        )
        assert found["codes"] == [0, 0], found["output"]
        said = [line for line in found["output"].splitlines() if "stopped by" in line]
        for signal, asked in (("SIGTERM", 4), ("SIGUSR1", 6)):
            stops = [line for line in said if signal in line]
            assert len(stops) == 2, found["output"]
            after = {int(line.split("after step ")[1].split(",")[0]) for line in stops}
            assert len(after) == 1, "all ranks stop after the same step"
            assert asked < after.pop() <= asked + 2
        assert_same(tmp_path, f"{name}-whole", f"{name}-stopped")


@pytest.mark.parametrize("zero", [0, 2])
def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_by_all(
    tmp_path: Path, starts: Starts, zero: int
) -> None:
    # samples 24 to 35 are step 3; rank 1 holds the odd ones
    (found,) = starts(
        tmp_path,
        two("bad bad=27 checkpoint_every=1 log_every=1 validate_every=0", zero=zero),
    )
    assert found["codes"] == [0, 0], found["output"]
    before, after, later = (tensors(tmp_path, "bad", step) for step in (2, 3, 4))
    for key, value in before.items():
        assert torch.equal(value, after[key]), f"{key} is as it was before the step"
    assert any(not torch.equal(value, later[key]) for key, value in after.items())
    assert all(torch.isfinite(value).all() for value in later.values())
    skipped = [line["train/skipped_steps"] for line in metrics(tmp_path, "bad")]
    assert skipped == [0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_too_many_of_them_end_the_training_on_all_ranks(tmp_path: Path, starts: Starts) -> None:
    (found,) = starts(tmp_path, two("bad bad=27 max_skipped_steps=0 validate_every=0"))
    assert found["codes"] == [1, 1], found["output"]
    for rank in (0, 1):
        assert f"rank {rank}: FloatingPointError: 1 steps in a row" in found["output"]
        saved = torch.load(stage(tmp_path, "bad") / f"bad_batch_rank{rank}.pt", weights_only=True)
        numbers = {number for batch in saved for number in batch["sample_number"].tolist()}
        assert numbers == set(range(24 + rank, 36, 2))


@pytest.mark.parametrize("zero", [0, 2])
def test_a_save_that_fails_ends_all_ranks_and_leaves_the_checkpoint_before(
    tmp_path: Path, starts: Starts, zero: int
) -> None:
    """As on a full disk; with room again the same command ends as the uninterrupted one."""
    found = starts(
        tmp_path,
        two("whole", zero=zero),
        two("full steps=9 term=2", zero=zero),
        two("full file_limit=20000", zero=zero),
        two("full", zero=zero),
    )
    assert [start["codes"] for start in found] == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert "rank 0: OSError" in found[2]["output"]
    assert "File too large" in found[2]["output"]
    assert "rank 1: RuntimeError: process 0 failed" in found[2]["output"]
    assert not list((stage(tmp_path, "full") / "checkpoints").glob(".*"))
    assert_same(tmp_path, "whole", "full")


def test_half_precision_is_trained_and_resumed_exactly(tmp_path: Path, starts: Starts) -> None:
    """fp16 with its loss scale, and bf16, on the CPU."""
    for precision in ("fp16", "bf16"):
        word = f'precision="{precision}"'
        found = starts(
            tmp_path,
            one(f"{precision}-whole {word}"),
            one(f"{precision}-killed {word} kill=5"),
            one(f"{precision}-killed {word}"),
        )
        assert [start["codes"] for start in found] == [[0], [-9], [0]], found
        assert_same(tmp_path, f"{precision}-whole", f"{precision}-killed")
    (refused,) = starts(tmp_path, two('half precision="fp16"', zero=1))
    assert refused["codes"] == [1, 1]
    assert "mixed_precision=fp16 is not supported with ZeRO" in refused["output"]


def test_another_training_begins_from_the_weights_of_a_checkpoint(
    tmp_path: Path, starts: Starts
) -> None:
    """Plain weights, whatever sharded the optimizer that made them; a wrong file is named."""
    first = stage(tmp_path, "first") / "checkpoints" / f"step-{STEPS:08d}"
    begin = f'second steps=1 learning_rate=1e-12 weight_decay=0.0 start_from="{first}"'
    found = starts(
        tmp_path,
        two("first", zero=2),
        one(begin),
        one(f'third start_from="{tmp_path}/nothing"'),
        one(f'fourth start_from="{first}/optimizer.safetensors"'),
    )
    assert [start["codes"] for start in found] == [[0, 0], [0], [1], [1]], found
    trained, started = tensors(tmp_path, "first"), tensors(tmp_path, "second", 1)
    for key, value in trained.items():
        if key.startswith("average/net") and "running" not in key and "num_b" not in key:
            torch.testing.assert_close(started[key.replace("average", "task")], value)
    assert f"no weights at {tmp_path}/nothing" in found[2]["output"]
    assert "does not fit this net" in found[3]["output"]


def test_frozen_weights_are_kept_and_resumed_with_zero(tmp_path: Path, starts: Starts) -> None:
    found = starts(
        tmp_path,
        two("whole frozen=1", zero=2),
        two("moved frozen=1 term=4", zero=2),
        two("moved frozen=1", zero=2),
    )
    assert [start["codes"] for start in found] == [[0, 0]] * 3, found
    assert_same(tmp_path, "whole", "moved")
    first, last = tensors(tmp_path, "whole", 3), tensors(tmp_path, "whole")
    assert torch.equal(first["task/net.0.weight"], last["task/net.0.weight"])
    assert "optimizer/0/exp_avg" not in last


def test_ways_of_sharding_that_are_not_trained_with_are_refused(
    tmp_path: Path, starts: Starts
) -> None:
    (found,) = starts(tmp_path, two("any", zero=3))
    assert found["codes"] == [1, 1], found["output"]
    assert (
        "zero_stage must be 1 or 2, got 3: the moving average is taken over whole weights"
        in (found["output"])
    )
    assert not (stage(tmp_path, "any") / "checkpoints").exists()
