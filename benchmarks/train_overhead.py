"""What `fit` costs beside forward, backward and optimizer: CPU time of the process, step by step.

The bare loop trains a copy of the net inside the stream that `fit` reads: it takes a step with each
batch before `fit` gets it. Both see the same batches, under the same load of the machine, and
end with the same weights to the last bit, or nothing is reported. A step of `fit` lasts from a
batch's arrival to the call for the next: loading is in neither. Left out are the first steps, with
all that is made only once (optimizer's state, count of FLOPs), and validation, previews and
checkpoints, which are switched off.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from train_setup import BareLoop, arithmetic, made_up_batches, make_task

from cldf_dist.config import Config
from cldf_dist.data.loader_workers import Batch
from cldf_dist.data.stream import Stream
from cldf_dist.runs.run import Run
from cldf_dist.training.ema import MovingAverage
from cldf_dist.training.fit import fit
from cldf_dist.training.on_slices import shard_set, training_stream
from cldf_dist.training.step_metrics import SkippedSteps, StepMeans

CPU = torch.device("cpu")
STAGE = "train-diffusion"
EVICTED_BYTES = 2**26  # touched before each call of a part: between steps nothing stays in caches
WITHOUT_TRACKING, TRACKED = "fit", "fit, MLflow"  # sent by another thread, beside both loops
NAMES = (WITHOUT_TRACKING, TRACKED)


@dataclass(frozen=True)
class Plan:
    """`steps` should be a multiple of `log_every`, that logging counts with its share."""

    warmup: int
    steps: int
    rounds: int


@dataclass(frozen=True)
class Seconds:
    """Per optimizer step, one value a round."""

    bare: list[float]
    fit: list[float]

    @property
    def over_bare(self) -> list[float]:
        return [ours - bare for ours, bare in zip(self.fit, self.bare, strict=True)]


def measure_fit(config: Config, plan: Plan) -> dict[str, Seconds]:
    """By implementation, in alternating rounds; `config`'s slices must be prepared."""
    found = {name: Seconds([], []) for name in NAMES}
    for _ in range(plan.rounds):
        for name in NAMES:
            settings = replace(config.tracking, enabled=name != WITHOUT_TRACKING)
            bare, ours = _round(replace(config, tracking=settings), plan)
            found[name].bare.append(bare)
            found[name].fit.append(ours)
    return found


def measure_bare(config: Config, plan: Plan) -> list[float]:
    """Seconds of CPU time per step of the bare loop alone, on made-up slices."""
    batch = made_up_batches(config, CPU, 1)[0]
    bare = BareLoop(make_task(config).to(memory_format=torch.channels_last), config)
    with arithmetic():
        for _ in range(plan.warmup):
            bare.step(batch)
        return [_cpu_seconds(lambda: bare.step(batch)) for _ in range(plan.steps)]


def measure_parts(config: Config, calls: int) -> dict[str, float]:
    """Median CPU seconds of the parts that can be called by themselves, caches evicted.

    The first is the floor: the bytes that a moving average must move, two numbers read and one
    written per parameter, in one call over one array.
    """
    task = make_task(config).to(memory_format=torch.channels_last)
    source = torch.ones(sum(parameter.numel() for parameter in task.parameters()))
    target, one, moved = torch.ones_like(source), torch.ones(()), torch.tensor(True)
    average = MovingAverage(task, config.diffusion.fit.ema_decay)
    means, skipped = StepMeans(CPU), SkippedSteps(CPU, 1, config.run_folder)

    def keep_records() -> None:
        means.add([{"loss": one}], one, torch.isfinite(one))
        skipped.note(0, {}, moved)

    return {
        "floor: bytes of the moving average": _median_seconds(lambda: target.add_(source), calls),
        "moving average": _median_seconds(lambda: average.follow(1000, moved), calls),
        "means, finite check, skipped steps": _median_seconds(keep_records, calls),
    }


def check_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Raise RuntimeError unless both have the same parameters, to the last bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    if not all(torch.equal(ours, bare) for ours, bare in pairs):
        raise RuntimeError("fit and the bare loop trained different nets: their times say nothing")


def _round(config: Config, plan: Plan) -> tuple[float, float]:
    """Mean seconds per step of the bare loop and of `fit`, from the start of a training."""
    num_steps = plan.warmup + plan.steps + 1  # the last has no call for a next batch
    settings = replace(
        config.diffusion.fit, steps=num_steps, num_workers=0, checkpoint_every=0, validate_every=0
    )
    config = replace(config, diffusion=replace(config.diffusion, fit=settings))
    shutil.rmtree(config.run_folder / STAGE, ignore_errors=True)
    run = Run(config, STAGE, ("diffusion",), ("prepare",))
    run.open()
    try:
        stream = training_stream(config, shard_set(config, run), config.diffusion.augment)
        task = make_task(config)
        bare = BareLoop(make_task(config).to(memory_format=torch.channels_last), config)
        alternating = _Alternating(stream, bare)
        with arithmetic():
            fit(task, alternating, settings, run)
    finally:
        run.close()
    check_same_weights(task, bare.task)
    measured = alternating.seconds[plan.warmup :]
    assert len(measured) == plan.steps, "the last step is not followed by a call for a batch"
    means = (statistics.fmean(column) for column in zip(*measured, strict=True))
    return next(means), next(means)


def _median_seconds(call: Callable[[], object], calls: int) -> float:
    evicted = torch.zeros(EVICTED_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(calls):
        evicted.add_(1)
        seconds.append(_cpu_seconds(call))
    return statistics.median(seconds)


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


class _Alternating:
    """A stream that trains the bare loop before it hands a batch on; it notes both times."""

    def __init__(self, stream: Stream, bare: BareLoop) -> None:
        self._stream, self._bare = stream, bare
        self.fingerprint = stream.fingerprint
        self.seconds: list[tuple[float, float]] = []

    def batches(self, consumed: int, **place: Any) -> Iterator[Batch]:
        for batch in self._stream.batches(consumed, **place):
            started = time.process_time()
            self._bare.step(batch)
            handed_on = time.process_time()
            yield batch
            self.seconds.append((handed_on - started, time.process_time() - handed_on))
