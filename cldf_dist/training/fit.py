"""The training loop: any task, any number of processes, resumed by the same command.

A task is an nn.Module with `.net` and `forward(batch) -> {"loss": scalar, ...}`. All randomness of
a step is a function of (seed, step) or (seed, sample number), never of the step at which the
process started. So a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cldf_dist.config import Fit
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import (
    accelerator,
    broadcast_object,
    fail_on_all_ranks,
    gather_objects,
    processes,
    zero_stage,
)
from cldf_dist.system.memory_format import fast_memory_format
from cldf_dist.system.progress import progress
from cldf_dist.system.seeding import sample_seed
from cldf_dist.system.signals import Stopped, StopVote, stop_signals
from cldf_dist.training.checkpoint import (
    Checkpoint,
    save_checkpoint,
)
from cldf_dist.training.ema import MovingAverage
from cldf_dist.training.engine import autocast, autocast_dtype, make_engine
from cldf_dist.training.prefetch import DeviceBatches, to_device
from cldf_dist.training.schedule import check_batch, learning_rate
from cldf_dist.training.start import same_checkpoint, same_items, start_from
from cldf_dist.training.step_metrics import SkippedSteps, StepMeans
from cldf_dist.training.throughput import Throughput

Batch = Mapping[str, Any]
NUM_SAMPLES = "#samples"  # beside the names of losses
VALIDATION = "validation/"  # prefix of the names of its means


class Batches(Protocol):
    """The interface of a stream of training samples; every batch holds `sample_number`."""

    def fingerprint(self) -> str:
        """A digest that differs where the samples or their order differ."""
        ...

    def batches(
        self, consumed: int, *, batch_size: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[Batch]:
        """Endless batches of one rank, from sample number `consumed` on; the size is global."""
        ...

    def fixed(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """One rank's part of samples 0 to num_samples - 1, the same in each call."""
        ...


def fit(
    task: nn.Module, stream: Batches, settings: Fit, run: Run, validation: Batches | None = None
) -> nn.Module:
    """Train `task` to `settings.steps`; returns the net (its moving average), frozen.

    Starts from the newest valid checkpoint in `run.folder`, written by any number of processes,
    with or without ZeRO. Raises ValueError where the batch does not divide over the processes,
    FloatingPointError after too many non-finite steps in a row, and `Stopped` after SIGTERM,
    SIGUSR1 or Ctrl-C, once everything is saved.
    """
    with stop_signals() as received_signals:  # workers start soon, and end late
        training = _Training(task, stream, settings, run)
        batches = DeviceBatches(
            stream.batches(
                training.step * settings.batch_size,
                batch_size=settings.batch_size // settings.gradient_accumulation_steps,
                rank=processes().rank,
                world_size=processes().world_size,
                num_workers=settings.num_workers,
            ),
            training.device,
        )
        try:
            _train(training, batches, validation, received_signals)
            return training.result()
        finally:
            batches.close()
            training.engine.close()


def _train(
    training: _Training,
    batches: DeviceBatches,
    validation: Batches | None,
    received_signals: list[int],
) -> None:
    settings, run = training.settings, training.run
    vote = StopVote(received_signals)
    with progress(run.stage, settings.steps, shown=run.is_main) as bar:
        bar.start_at(training.step)
        if not training.reported:  # it was stopped before it could
            training.report(validation, received_signals)
        while training.step < settings.steps:
            vote.open()
            training.advance(batches)
            step = training.step
            bar.advance(note=training.note)
            last = step == settings.steps
            stop = vote.result()
            with training.throughput.pause():
                if not stop:  # else the time to save may be short: it is done on resume
                    stop = training.report(validation, received_signals)
                if stop or _is_due(step, settings.checkpoint_every, last):
                    training.save()
                if last and not training.reported:  # all is safe now
                    training.report(validation, [])
                    training.save()
            if stop and not last:
                raise Stopped(stop, f"after step {step}")
            run.stop_requested = stop
    training.preview()


def _is_due(step: int, every: int, last: bool = False) -> bool:
    """True if what is done every `every` steps (0: never) is due at this step."""
    return every > 0 and (last or step % every == 0)


class _Training:
    """The state between steps: weights, moving average, optimizer, counters."""

    def __init__(self, task: nn.Module, stream: Batches, settings: Fit, run: Run) -> None:
        check_batch("fit", settings, processes().world_size)
        parts = settings.gradient_accumulation_steps
        if parts > 1 and not getattr(task, "accumulates", True):
            raise ValueError(
                f"{type(task).__name__} contrasts within the batch: "
                f"fit.gradient_accumulation_steps must be 1, got {parts}"
            )
        self.settings, self.run = settings, run
        self.device = accelerator().device
        found = same_checkpoint(run)
        self.items = same_items(stream.fingerprint(), found)
        with fail_on_all_ranks():
            if found:
                task.load_state_dict(found.tensors["task"])
            elif settings.start_from:
                start_from(task, Path(settings.start_from))
        self.task: Any = task.to(self.device)
        if not zero_stage():  # DeepSpeed flattens all weights into one buffer
            # torch's types do not know this form of `to`
            layout: Any = {"memory_format": fast_memory_format(self.device, settings.channels_last)}
            self.task = self.task.to(**layout)
        self.average = MovingAverage(self.task, settings.ema_decay)
        if settings.compile:  # the net, not the task: tasks make generators
            net: Any = self.task.net
            net.compile()
        self.engine = make_engine(self.task, settings, run.config.mixed_precision)
        takes_half = getattr(task, "autocast", True)
        self.dtype = autocast_dtype(run.config.mixed_precision, self.device) if takes_half else None
        self.means = StepMeans(self.device)
        self.skipped = SkippedSteps(self.device, settings.max_skipped_steps, run.folder)
        self.throughput = Throughput(self.device, self.dtype, processes().world_size)
        self.has_buffers = any(True for _ in self.task.buffers())
        self.note = ""
        self.reported = found is None or bool(found.state["reported"])
        self.step = self._resume(found) if found else 0
        self.throughput.start(self.step)
        run.start_logging_from(self.step, again="" if self.reported else VALIDATION)

    def _resume(self, found: Checkpoint) -> int:
        self.average.task.load_state_dict(found.tensors["average"])
        self.engine.load(found)
        self.skipped.load(found.state)
        self.means.load(found.state["means"])
        if self.run.is_main:
            print(f"{self.run.stage}: resuming after step {found.state['step']}", file=sys.stderr)
        return int(found.state["step"])

    def advance(self, batches: DeviceBatches) -> None:
        """Take one optimizer step."""
        settings, step = self.settings, self.step
        batch = batches.next()
        if not self.throughput.is_counted:
            self._count_flops(batch, batches.waited)
        if not self.task.training:  # setting it walks through all modules
            self.task.train()
        # dropout inside the net draws from the global generator: make it a function of the step
        seed = sample_seed(self.run.config.seed, step, f"rank {processes().rank}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks for every kind of device
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        buffers = [buffer.clone() for buffer in self.task.buffers()] if self.has_buffers else []
        parts, used = [], []
        for micro in range(settings.gradient_accumulation_steps):
            if micro > 0:
                batch = batches.next()
            with self.engine.micro_batch(last=micro == settings.gradient_accumulation_steps - 1):
                losses = self.engine.forward(batch)
                self.engine.backward(_finite_or_skipped(losses["loss"]))
            parts.append(losses)
            used.append(batch)
            if micro < settings.gradient_accumulation_steps - 1 or step + 1 < settings.steps:
                batches.prefetch()
        norm, moved = self.engine.step(learning_rate(step, settings))
        for before, buffer in zip(buffers, self.task.buffers()):  # a skipped step changes nothing
            buffer.copy_(torch.where(moved, buffer, before))
        self.average.follow(step, moved)
        self.means.add(parts, norm, moved)
        self.skipped.note(step, used, moved)
        self.step += 1
        self.reported = False
        if _is_due(self.step, settings.log_every, self.step == settings.steps):
            self._log(batches.waited)

    def _count_flops(self, batch: Batch, waited: float) -> None:
        self.throughput.count(self.average.task, batch, len(batch["sample_number"]))
        self.throughput.start(self.step, waited)

    def report(self, validation: Batches | None, received_signals: list[int]) -> int:
        """Validate and preview where due; returns the signal that interrupted it, or 0."""
        settings, last = self.settings, self.step == self.settings.steps
        if validation and _is_due(self.step, settings.validate_every, last):
            stop = self.validate(validation, received_signals)
            if stop:
                return stop
        if _is_due(self.step, settings.preview_every):
            self.preview()
        self.reported = True
        return 0

    def validate(self, validation: Batches, received_signals: list[int]) -> int:
        """Log mean losses of the averaged net, over the same samples and noise each time.

        Returns the stop signal that any process received meanwhile, or 0; nothing is logged after
        a signal.
        """
        sums: dict[str, Tensor] = {}
        place = {"rank": processes().rank, "world_size": processes().world_size}
        per_step = self.settings.batch_size // (
            processes().world_size * self.settings.gradient_accumulation_steps
        )
        self.average.take_buffers_of_main()
        with torch.no_grad(), autocast(self.device, self.dtype):
            for batch in validation.fixed(self.settings.validation_samples, per_step, **place):
                if received_signals:
                    break
                losses = self.average.task(to_device(batch, self.device))
                size = len(batch["sample_number"])
                for name, value in {**losses, NUM_SAMPLES: torch.ones(())}.items():
                    weighted = value.detach().float().to(self.device) * size
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + weighted
        stop = int(max(gather_objects(max(received_signals, default=0))))
        if stop:
            return stop
        names = broadcast_object(sorted(sums))
        stacked = torch.stack([sums.get(name, torch.zeros(())).to(self.device) for name in names])
        totals = dict(zip(names, accelerator().reduce(stacked, "sum").tolist()))
        weight = max(totals.pop(NUM_SAMPLES), 1.0)
        means = {f"{VALIDATION}{name}": total / weight for name, total in totals.items()}
        self.run.log(self.step, means)
        return 0

    def preview(self) -> None:
        """Write the task's preview images of the averaged net as PNG files."""
        if not (self.run.is_main and hasattr(self.task, "preview")):
            return
        from matplotlib import image

        folder = self.run.folder / "previews"
        folder.mkdir(exist_ok=True)
        average = self.average.task
        for name, picture in average.preview(average.net).items():
            path = folder / f"{name}-{self.step:08d}.png"
            image.imsave(path, picture, cmap="gray", vmin=0, vmax=255)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        state = {
            "step": self.step,
            "items": self.items,
            "reported": self.reported,
            # since the last log: without them the next line of a resumed run would differ
            "means": gather_objects(self.means.state()),
            **self.skipped.state(),
            **self.engine.state(),
        }
        tensors = {
            "task": self.task.state_dict(),
            "average": self.average.task.state_dict(),
            "optimizer": self.engine.optimizer_tensors(),
        }
        save_checkpoint(
            self.run.folder / "checkpoints",
            broadcast_object(self.run.id if self.run.is_main else ""),
            state,
            tensors,
            keep_checkpoints=self.settings.keep_checkpoints,
        )

    def result(self) -> nn.Module:
        task = self.average.task if self.settings.ema_decay else self.task
        net: nn.Module = task.net
        return net.eval().requires_grad_(False)

    def _log(self, waited: float) -> None:
        metrics = {f"train/{name}": mean for name, mean in self.means.over_processes().items()}
        metrics |= {
            "train/learning_rate": learning_rate(self.step - 1, self.settings),
            "train/skipped_steps": float(self.skipped.total),
        }
        metrics |= self.throughput.metrics(self.step, self.settings.batch_size, waited)
        self.note = f"loss {metrics.get('train/loss', math.nan):.4f}"
        self.run.log(self.step, metrics)


def _finite_or_skipped(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradient is NaN, so that all processes skip the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
