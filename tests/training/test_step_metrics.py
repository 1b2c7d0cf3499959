"""Means, skipped steps, the moving average and the way of batches to the device."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_dist.training.ema import MovingAverage
from cldf_dist.training.prefetch import DeviceBatches
from cldf_dist.training.step_metrics import SkippedSteps, StepMeans
from cldf_dist.training.throughput import PEAKS, Throughput, memory_gb, peak_tflops

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def losses(*values: float) -> list[dict[str, Tensor]]:
    return [{"loss": torch.tensor(value), "error": torch.tensor(2 * value)} for value in values]


def test_means_are_over_steps_that_moved_and_their_micro_batches() -> None:
    means = StepMeans(CPU)
    assert means.over_processes() == {}
    means.add(losses(1.0, 3.0), torch.tensor(5.0), YES)
    means.add(losses(math.nan, 1.0), torch.tensor(math.nan), NO)
    means.add(losses(4.0, 4.0), torch.tensor(7.0), YES)
    assert means.over_processes() == {"loss": 3.0, "error": 6.0, "grad_norm": 6.0}
    assert means.over_processes() == {}, "a fresh start"
    means.add(losses(math.inf), torch.tensor(math.inf), NO)
    assert means.over_processes() == {}, "no step moved"


def test_means_go_on_where_they_were_saved_also_with_fewer_processes() -> None:
    first, second = StepMeans(CPU), StepMeans(CPU)
    first.add(losses(1.0), torch.tensor(1.0), YES)
    second.add(losses(5.0), torch.tensor(3.0), YES)
    same = StepMeans(CPU)
    same.load([first.state()])
    assert same.over_processes() == {"loss": 1.0, "error": 2.0, "grad_norm": 1.0}
    alone = StepMeans(CPU)
    alone.load([first.state(), second.state()])
    assert alone.over_processes() == {"loss": 3.0, "error": 6.0, "grad_norm": 2.0}
    alone.load([StepMeans(CPU).state()])
    assert alone.over_processes() == {}


@pytest.mark.parametrize("delay", [0, 1])
def test_steps_that_are_skipped_in_a_row_end_the_training(tmp_path: Path, delay: int) -> None:
    """With the delay of a GPU one step later, but with the same step and the same batches."""
    skipped = SkippedSteps(CPU, 1, tmp_path)
    skipped.delay = delay
    batches = [[{"value": torch.tensor(step)}] for step in range(6)]
    for step, moved in enumerate((YES, NO, YES, NO)):
        skipped.note(step, batches[step], moved)
    assert skipped.total == 2
    assert skipped.state() == {"skipped": 2, "skipped_in_a_row": 1}
    if delay:
        skipped.note(4, batches[4], NO)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* the last is step 5; its"):
        skipped.note(4 + delay, batches[4 + delay], NO)
    (saved,) = torch.load(tmp_path / "bad_batch_rank0.pt", weights_only=True)
    assert saved == {"value": torch.tensor(4)}


def test_the_count_of_skipped_steps_is_taken_up(tmp_path: Path) -> None:
    skipped = SkippedSteps(CPU, 2, tmp_path)
    skipped.load({"skipped": 7, "skipped_in_a_row": 2})
    assert skipped.total == 7
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        skipped.note(0, [], NO)


def test_the_average_follows_alike_on_a_device_and_stays_where_nothing_moved() -> None:
    torch.manual_seed(0)
    task: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, on_device = MovingAverage(task, 0.9), MovingAverage(task, 0.9)
    for step in range(20):
        with torch.no_grad():
            for parameter in task.parameters():
                parameter += torch.randn_like(parameter)
            task(torch.randn(5, 3))
        moved = torch.tensor(step % 3 != 0)
        before = [parameter.clone() for parameter in average.task.parameters()]
        average.follow(step, moved)
        decay = min(0.9, (1 + step) / (10 + step))
        current = [parameter.detach() for parameter in task.parameters()]
        on_device._follow_on_device(current, (1 - decay) * moved.float())
        for mine, other, old, new in zip(
            average.task.parameters(), on_device.task.parameters(), before, current
        ):
            torch.testing.assert_close(mine, other)
            expected = decay * old + (1 - decay) * new if moved else old
            torch.testing.assert_close(mine, expected)
        assert torch.equal(average.task[1].running_mean, task[1].running_mean)
    assert not any(parameter.requires_grad for parameter in average.task.parameters())


def test_batches_come_in_order_and_the_wait_is_counted() -> None:
    closed = []

    class Source:
        def __init__(self) -> None:
            self.number = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return self

        def __next__(self) -> dict[str, Any]:
            self.number += 1
            return {"image": torch.full((2,), self.number), "sample_number": torch.arange(2)}

        def close(self) -> None:
            closed.append(self.number)

    batches = DeviceBatches(Source(), CPU)
    for number in (1, 2, 3):
        assert batches.next()["image"].tolist() == [number] * 2
        batches.prefetch()
    assert batches.waited > 0
    batches.close()
    assert closed == [3], "nothing is read ahead where there is no device"


@pytest.mark.gpu
def test_batches_travel_ahead_on_a_gpu() -> None:
    device = torch.device("cuda")
    source = (
        {"image": torch.full((64, 64), n), "sample_number": torch.arange(1)} for n in range(9)
    )
    batches = DeviceBatches(source, device)
    for number in range(9):
        batch = batches.next()
        if number < 8:
            batches.prefetch()
        assert batch["image"].is_cuda
        assert not batch["sample_number"].is_cuda
        assert (batch["image"] == number).all()


def test_throughput_by_hand() -> None:
    net = nn.Linear(10, 20, bias=False)

    class Task(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": net(batch["image"]).sum()}

    speed = Throughput(CPU, None, 1)
    assert not speed.is_counted
    speed.count(Task(), {"image": torch.ones(4, 10)}, 4)
    assert speed.is_counted
    speed.start(0)
    with speed.pause():
        sum(range(100_000))
    found = speed.metrics(5, 8, waited=0.0)
    rate = found["speed/slices_per_second"]
    # a forward is 2 x 10 x 20 FLOPs a slice, the backward twice that
    assert found["speed/model_tflops"] == pytest.approx(rate * 3 * 2 * 10 * 20 / 1e12)
    assert found["speed/data_wait_fraction"] == 0.0
    assert "speed/model_flops_utilisation" not in found, "the peak of a CPU is not known"
    assert 0.05 < found["speed/memory_gb"] == memory_gb(CPU)


def test_peaks_are_found_by_the_longest_name() -> None:
    words = [word for word, _, _ in PEAKS]
    for number, word in enumerate(words):
        assert not any(word.startswith(earlier) for earlier in words[:number]), word
    assert peak_tflops(CPU, torch.bfloat16) == 0.0
