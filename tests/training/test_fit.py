import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cldf_dist.config import Config, Data, Fit, Tracking
from cldf_dist.data.stream import Stream
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.runs.run import Run
from cldf_dist.system.seeding import sample_seed
from cldf_dist.system.signals import Stopped
from cldf_dist.tasks.contrast import Contrast
from cldf_dist.training.checkpoint import newest_checkpoint
from cldf_dist.training.fit import fit
from cldf_dist.training.schedule import learning_rate

SETTINGS = Fit(
    steps=9,
    batch_size=4,
    learning_rate=0.05,
    warmup_steps=2,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.9,
    checkpoint_every=3,
    keep_checkpoints=20,
    validate_every=4,
    validation_samples=6,
    log_every=2,
)


class Blobs:
    """Small random images; a bright one has label 1."""

    def __len__(self) -> int:
        return 10

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        rng = np.random.default_rng([position, sample_number])
        label = position % 2
        image = rng.normal(size=(1, 6, 6)).astype(np.float32) + label
        return {"image": torch.from_numpy(image), "label": label, "sample_number": sample_number}


class Brightness(nn.Module):
    """A task: a convolutional net with dropout and batch norm that tells bright from dark."""

    def __init__(self, dropout: float = 0.2, trouble: Callable[[int], None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
            nn.Flatten(), nn.Linear(64, 2),
        )  # fmt: skip
        self.trouble = trouble
        self.calls = 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
            if self.trouble is not None:
                self.trouble(self.calls)
        logits = self.net(batch["image"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}


class Slope(nn.Module):
    """A task whose gradient is the mean of the batch's `value`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.net.weight, 3.0)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.net.weight.squeeze() * batch["value"]).mean()}


class Values:
    """Numbers in a fixed order: `value` is a function of the sample number."""

    def __init__(self, value: Callable[[int], float]) -> None:
        self.value = value

    def __len__(self) -> int:
        return 1000

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        return {"value": torch.tensor(self.value(sample_number)), "sample_number": sample_number}


def stream_of(items: Any) -> Stream:
    return Stream(items, np.zeros(len(items), dtype=np.int64), seed=1)


def new_run(runs: Path, name: str = "a") -> Run:
    config = Config(
        name=name, runs=str(runs), data=Data(dataset="phantom"), tracking=Tracking(enabled=False)
    )
    run = Run(config, "train-test", ("cam",))
    run.open()
    return run


def train(
    runs: Path, settings: Fit = SETTINGS, *, name: str = "a", task: nn.Module | None = None,
    items: Any = None, validation: bool = True,
) -> nn.Module:  # fmt: skip
    """One start of a training; `Brightness` has the same initial weights each time."""
    stream = stream_of(items or Blobs())
    run = new_run(runs, name)
    try:
        return fit(task or Brightness(), stream, settings, run, stream if validation else None)
    finally:
        run.close()


def folder(runs: Path, name: str = "a") -> Path:
    return runs / name / "train-test"


def metrics(runs: Path, name: str = "a") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [
        json.loads(line) for line in (folder(runs, name) / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if k != "time" and "speed/" not in k} for line in lines]


def checkpoint(runs: Path, step: int, name: str = "a") -> dict[str, dict[str, Tensor]]:
    path = folder(runs, name) / "checkpoints" / f"step-{step:08d}"
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}


def assert_same_training(runs: Path, first: str, second: str, step: int) -> None:
    mine, theirs = checkpoint(runs, step, first), checkpoint(runs, step, second)
    assert set(mine) == set(theirs) == {"task", "average", "optimizer"}
    for group, values in mine.items():
        assert set(values) == set(theirs[group])
        for key, value in values.items():
            assert torch.equal(value, theirs[group][key]), (group, key)
    assert metrics(runs, first) == metrics(runs, second)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a finished training named "whole"."""
    runs = tmp_path_factory.mktemp("runs")
    train(runs, name="whole")
    return runs


def test_training_logs_validates_and_learns(uninterrupted: Path) -> None:
    lines = metrics(uninterrupted, "whole")
    logged = [line["step"] for line in lines if "train/loss" in line]
    assert logged == [2, 4, 6, 8, 9]
    validated = [line["step"] for line in lines if "validation/loss" in line]
    assert validated == [4, 8, 9]
    assert {"train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate",
            "train/skipped_steps"} <= set(lines[0])  # fmt: skip
    final = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert final[-1] < final[0]


@pytest.mark.parametrize("failing_step", [1, 3, 4, 6, 8])
def test_resumed_run_equals_uninterrupted_run(uninterrupted: Path, failing_step: int) -> None:
    def break_down(call: int) -> None:
        if call == failing_step:
            raise RuntimeError("the power is gone")

    name = f"resumed-{failing_step}"
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(uninterrupted, name=name, task=Brightness(trouble=break_down))
    train(uninterrupted, name=name)
    assert_same_training(uninterrupted, "whole", name, step=9)


def test_a_run_that_breaks_down_again_and_again_still_equals_the_uninterrupted_one(
    uninterrupted: Path,
) -> None:
    def fragile(call: int) -> None:
        if call == 5:
            raise RuntimeError("again")

    starts = 0
    settings = replace(SETTINGS, checkpoint_every=2)
    while starts < 10:
        starts += 1
        try:
            train(uninterrupted, settings, name="fragile", task=Brightness(trouble=fragile))
            break
        except RuntimeError:
            continue
    assert starts == 3
    assert_same_training(uninterrupted, "whole", "fragile", step=9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_everything_saved(
    uninterrupted: Path, number: signal.Signals
) -> None:
    def ask(call: int) -> None:
        if call == 5:
            os.kill(os.getpid(), number)

    name = number.name
    with pytest.raises(Stopped, match=f"stopped by {name} after step 5, all saved") as caught:
        train(uninterrupted, name=name, task=Brightness(trouble=ask))
    assert caught.value.number == number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    task = Brightness()
    train(uninterrupted, name=name, task=task)
    assert task.calls == 4, "steps 6 to 9"
    assert_same_training(uninterrupted, "whole", name, step=9)


def test_a_signal_in_the_last_step_finishes_the_training(tmp_path: Path) -> None:
    def ask(call: int) -> None:
        if call == SETTINGS.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path, task=Brightness(trouble=ask))
    assert checkpoint(tmp_path, SETTINGS.steps)


def test_a_signal_during_validation_saves_first_and_validates_after_the_resume(
    uninterrupted: Path,
) -> None:
    """The time that a scheduler gives may be shorter than a validation."""

    class Slow(Brightness):
        seen = 0

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if not self.training:
                Slow.seen += 1
                if Slow.seen == 2:  # the first counts FLOPs
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch)

    with pytest.raises(Stopped, match="after step 4"):
        train(uninterrupted, name="validating", task=Slow())
    assert Slow.seen == 2, "the other batches were not waited for"
    assert not any("validation/loss" in line for line in metrics(uninterrupted, "validating"))
    train(uninterrupted, name="validating")
    assert_same_training(uninterrupted, "whole", "validating", step=9)


def test_a_signal_while_the_loader_starts_is_not_lost(tmp_path: Path) -> None:
    class Starting(Stream):
        def batches(self, consumed: int, **place: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().batches(consumed, **place)

    run = new_run(tmp_path)
    try:
        with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 1"):
            fit(Brightness(), Starting(Blobs(), np.zeros(10, np.int64), 1), SETTINGS, run)
    finally:
        run.close()


def test_other_samples_than_before_are_refused(tmp_path: Path) -> None:
    """As when data.on_damaged=skip leaves one more out: the order would be another one."""

    class Fewer(Blobs):
        def __len__(self) -> int:
            return 9

    train(tmp_path, replace(SETTINGS, steps=3))
    with pytest.raises(ValueError, match="step-00000003 was trained on other samples"):
        train(tmp_path, items=Fewer())


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient(tmp_path: Path) -> None:
    class Infinite(Slope):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            constant = math.inf if 9 in batch["sample_number"] else 0.0
            return {"loss": super().forward(batch)["loss"] + constant}

    settings = replace(SETTINGS, steps=4, checkpoint_every=1, log_every=1)
    items = Values(lambda number: 1.0)
    train(tmp_path, settings, task=Infinite(), items=items, validation=False)
    weights = [checkpoint(tmp_path, step)["task"]["net.weight"].item() for step in (2, 3, 4)]
    assert weights[0] == weights[1] != weights[2]
    assert [line["train/skipped_steps"] for line in metrics(tmp_path)] == [0, 0, 1, 1]


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    def insist(call: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    task = Brightness(trouble=insist)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, task=task)
    assert task.calls == 1
    assert not (folder(tmp_path) / "checkpoints").exists()


def test_a_finished_training_gives_its_net_without_another_step(uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted / "whole", uninterrupted / "finished")
    task = Brightness()
    net = train(uninterrupted, name="finished", task=task)
    assert task.calls == 0
    average = checkpoint(uninterrupted, 9, "whole")["average"]
    for key, value in net.state_dict().items():
        assert torch.equal(value, average[f"net.{key}"])
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_accumulation_changes_the_result_by_round_off_only(tmp_path: Path) -> None:
    class Smooth(nn.Module):
        """No batch norm and no dropout: they see the micro-batch."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])}

    for gradient_accumulation_steps in (1, 2, 4):
        settings = replace(SETTINGS, gradient_accumulation_steps=gradient_accumulation_steps)
        train(tmp_path, settings, name=f"by-{gradient_accumulation_steps}", task=Smooth())
    whole = checkpoint(tmp_path, 9, "by-1")["task"]
    for gradient_accumulation_steps in (2, 4):
        parts = checkpoint(tmp_path, 9, f"by-{gradient_accumulation_steps}")["task"]
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(
            metrics(tmp_path, f"by-{gradient_accumulation_steps}"), metrics(tmp_path, "by-1")
        ):
            assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    # the batch of step 3 holds samples 8 to 11
    items = Values(lambda number: math.nan if number == 9 else 1.0)
    settings = replace(SETTINGS, steps=5, checkpoint_every=1, log_every=1)
    train(tmp_path, settings, task=Slope(), items=items, validation=False)
    weights = [checkpoint(tmp_path, step)["task"]["net.weight"].item() for step in range(1, 6)]
    assert weights[2] == weights[1], "the step is skipped"
    assert weights[3] < weights[2] < weights[0], "the others are not"
    averages = [checkpoint(tmp_path, step)["average"]["net.weight"].item() for step in (2, 3)]
    assert averages[0] == averages[1]
    assert [line["train/skipped_steps"] for line in metrics(tmp_path)] == [0, 0, 1, 1, 1]


def test_the_count_of_skipped_steps_survives_a_restart(tmp_path: Path) -> None:
    items = Values(lambda number: math.inf if number == 0 else 1.0)
    settings = replace(SETTINGS, checkpoint_every=1, log_every=1)
    train(tmp_path, replace(settings, steps=2), task=Slope(), items=items, validation=False)
    train(tmp_path, replace(settings, steps=4), task=Slope(), items=items, validation=False)
    assert metrics(tmp_path)[-1]["train/skipped_steps"] == 1


def test_too_many_non_finite_steps_in_a_row_stop_with_the_batch(tmp_path: Path) -> None:
    items = Values(lambda number: math.nan if number >= 8 else 1.0)
    settings = replace(SETTINGS, max_skipped_steps=2)
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row .* the last is step 5; its batches are in"
    ):
        train(tmp_path, settings, task=Slope(), items=items, validation=False)
    (saved,) = torch.load(folder(tmp_path) / "bad_batch_rank0.pt", weights_only=True)
    assert saved["sample_number"].tolist() == [16, 17, 18, 19]
    assert saved["value"].isnan().all()


def test_non_finite_steps_that_are_not_in_a_row_do_not_stop(tmp_path: Path) -> None:
    items = Values(lambda number: math.nan if (number // 4) % 2 else 1.0)
    settings = replace(SETTINGS, max_skipped_steps=1)
    train(tmp_path, settings, task=Slope(), items=items, validation=False)
    assert metrics(tmp_path)[-1]["train/skipped_steps"] == 4


def test_the_moving_average_warms_up(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=3, checkpoint_every=1, ema_decay=0.15)
    train(tmp_path, settings, task=Slope(), items=Values(lambda number: 1.0), validation=False)
    average = 3.0
    # (1 + step) / (10 + step) = 0.1, 2 / 11; then ema_decay is smaller than 3 / 12
    for step, decay in ((1, 1 / 10), (2, 0.15), (3, 0.15)):
        stored = checkpoint(tmp_path, step)
        weight = stored["task"]["net.weight"].item()
        average = decay * average + (1 - decay) * weight
        assert stored["average"]["net.weight"].item() == pytest.approx(average, rel=1e-6)


def test_the_average_holds_the_buffers_of_the_trained_net(uninterrupted: Path) -> None:
    stored = checkpoint(uninterrupted, 9, "whole")
    for name in ("net.1.running_mean", "net.1.num_batches_tracked"):
        assert torch.equal(stored["average"][name], stored["task"][name])
    assert stored["task"]["net.1.num_batches_tracked"] == 9


def test_without_an_average_the_trained_net_is_given(tmp_path: Path) -> None:
    net = train(tmp_path, replace(SETTINGS, ema_decay=0.0))
    stored = checkpoint(tmp_path, 9)["task"]
    for key, value in net.state_dict().items():
        assert torch.equal(value, stored[f"net.{key}"])


def test_learning_rate_by_hand() -> None:
    settings = Fit(steps=12, learning_rate=2.0, warmup_steps=4, final_learning_rate_fraction=0.1)
    assert [learning_rate(step, settings) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(8, settings) == pytest.approx(2 * 0.55)  # half of the cosine
    assert learning_rate(6, settings) == pytest.approx(2 * (0.1 + 0.45 * (1 + math.sqrt(0.5))))
    assert learning_rate(12, settings) == pytest.approx(0.2)
    assert learning_rate(99, settings) == pytest.approx(0.2)
    assert learning_rate(0, replace(settings, warmup_steps=0)) == 2.0


def test_the_first_step_of_adamw_by_hand(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1, warmup_steps=0, learning_rate=0.25, weight_decay=0.2)
    train(tmp_path, settings, task=Slope(), items=Values(lambda number: 7.0), validation=False)
    # AdamW's first step has the size of the learning rate; the decay takes its share before
    weight = 3.0 * (1 - 0.25 * 0.2) - 0.25
    assert checkpoint(tmp_path, 1)["task"]["net.weight"].item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.5, 0.5), (0.0, 4.0), (9.0, 4.0)])
def test_gradients_are_clipped_to_the_norm(
    tmp_path: Path, clip_norm: float, expected: float
) -> None:
    settings = replace(SETTINGS, steps=1, clip_norm=clip_norm, log_every=1)
    train(tmp_path, settings, task=Slope(), items=Values(lambda number: 4.0), validation=False)
    # Adam's first moment is 0.1 of the first gradient
    gradient = checkpoint(tmp_path, 1)["optimizer"]["0/exp_avg"].item() / 0.1
    assert gradient == pytest.approx(expected, rel=1e-4)
    assert metrics(tmp_path)[0]["train/grad_norm"] == pytest.approx(4.0), "before clipping"


def test_the_loss_that_is_logged_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    items = Values(lambda number: float(number // 4))  # the loss is weight x step
    settings = replace(SETTINGS, steps=4, learning_rate=1e-9, log_every=2)
    train(tmp_path, settings, task=Slope(), items=items, validation=False)
    losses = [line["train/loss"] for line in metrics(tmp_path)]
    assert losses == pytest.approx([3.0 * 0.5, 3.0 * 2.5], rel=1e-5)


def test_validation_weighs_samples_alike_and_uses_the_average(tmp_path: Path) -> None:
    # six samples in batches of four and two: 0 0 0 0 | 12 12
    items = Values(lambda number: 12.0 if number >= 4 else 0.0)
    settings = replace(SETTINGS, steps=1, validate_every=1)
    train(tmp_path, settings, task=Slope(), items=items)
    average = checkpoint(tmp_path, 1)["average"]["net.weight"].item()
    (line,) = [line for line in metrics(tmp_path) if "validation/loss" in line]
    assert line["validation/loss"] == pytest.approx(average * 4.0, rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"fit\.batch_size \(4, .*multiple of processes x .* = 1 x 3"
    ):
        train(tmp_path, replace(SETTINGS, gradient_accumulation_steps=3))


def test_the_contrast_task_refuses_accumulation(tmp_path: Path) -> None:
    task = Contrast(PixelDecoder({"up0.1": 3}, 4, 2), temperature=0.1)
    with pytest.raises(
        ValueError, match=r"Contrast contrasts within the batch: .* must be 1, got 2"
    ):
        train(tmp_path, replace(SETTINGS, gradient_accumulation_steps=2), task=task)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_after_the_one_before(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted / "whole", uninterrupted / "damaged")
    path = folder(uninterrupted, "damaged") / "checkpoints" / "step-00000009" / "task.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    task = Brightness()
    train(uninterrupted, name="damaged", task=task)
    assert task.calls == 3, "steps 7 to 9"
    assert "step-00000009 is skipped: task.safetensors is damaged" in capsys.readouterr().err
    assert_same_training(uninterrupted, "whole", "damaged", step=9)


def test_a_checkpoint_of_another_run_is_passed_over_and_named(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(uninterrupted, replace(SETTINGS, steps=3), name="ours")
    newest = "checkpoints/step-00000009"
    shutil.copytree(folder(uninterrupted, "whole") / newest, folder(uninterrupted, "ours") / newest)
    task = Brightness()
    train(uninterrupted, replace(SETTINGS, steps=5), name="ours", task=task)
    assert task.calls == 2
    owner = json.loads((folder(uninterrupted, "whole") / "run.json").read_text())["id"]
    said = capsys.readouterr().err
    assert f"step-00000009 is skipped: it belongs to another run ({owner})" in said


def test_training_leaves_nothing_to_the_global_generator(tmp_path: Path) -> None:
    class Restless(Brightness):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            result = super().forward(batch)
            torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
            return result

    train(tmp_path, name="calm")
    train(tmp_path, name="restless", task=Restless())
    assert_same_training(tmp_path, "calm", "restless", step=9)


def test_a_checkpoint_holds_the_run_it_belongs_to(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="it belongs to another run"):
        newest_checkpoint(folder(uninterrupted, "whole") / "checkpoints", "someone else")
    identity = json.loads((folder(uninterrupted, "whole") / "run.json").read_text())["id"]
    found = newest_checkpoint(folder(uninterrupted, "whole") / "checkpoints", identity)
    assert found is not None
    assert found.state["step"] == 9


def test_seeds_differ_by_purpose_step_and_seed() -> None:
    seeds = {sample_seed(s, n, p) for s in (0, 1) for n in (0, 1, 2) for p in ("noise", "augment")}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 0, "noise") == 33747655177193559, "old runs would not resume"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train-cam", "train-patch-classifier"])
def test_sigterm_through_the_command_line_then_the_same_command_finishes(
    stage: str,
    debug_run: Any,
    tmp_path: Path,
    start: Callable[..., "subprocess.Popen[str]"],
    wait_until: Callable[..., None],
) -> None:
    from cldf_dist.__main__ import main

    settings = ["fit.steps=100", "fit.log_every=1", "fit.validate_every=0"]
    whole = debug_run.copy_to(tmp_path / "whole", "prepare")
    assert main([stage, *whole.words, *settings]) == 0
    run = debug_run.copy_to(tmp_path / "stopped", "prepare")
    command = [stage, *run.words, *settings]
    process = start("-m", "cldf_dist", *command)
    log = run.folder / stage / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after step" in errors
    assert "the same command resumes" in errors
    assert not (run.folder / stage / "DONE").exists()
    assert len(log.read_text().splitlines()) < 100
    assert main(command) == 0
    net = f"{stage}/net.safetensors"
    assert (run.folder / net).read_bytes() == (whole.folder / net).read_bytes()


@pytest.mark.slow
def test_a_signal_to_the_whole_group_spares_the_loader_workers(
    debug_run: Any,
    tmp_path: Path,
    start: Callable[..., "subprocess.Popen[str]"],
    wait_until: Callable[..., None],
) -> None:
    """As Ctrl-C in a terminal, scancel and torch's launcher send it."""
    run = debug_run.copy_to(tmp_path / "run", "prepare")
    settings = ["fit.steps=100000", "fit.log_every=1", "fit.num_workers=1", "fit.validate_every=0"]
    process = start("-m", "cldf_dist", "train-cam", *run.words, *settings, start_new_session=True)
    log = run.folder / "train-cam" / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    saved = int(errors.split("after step ")[1].split(",")[0])
    assert (run.folder / "train-cam" / "checkpoints" / f"step-{saved:08d}").is_dir()
