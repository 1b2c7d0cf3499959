"""The one training loop: any task, any number of processes, resumed by the same command.

A task is an nn.Module with `.net` and `forward(batch) -> {"loss": scalar, ...}`. All randomness of
a step is a function of (seed, step) or (seed, sample number), never of where the process started;
that makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cldf_dist.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from cldf_dist.config import Fit
from cldf_dist.processes import accelerator, from_main, processes, wait_for_everyone
from cldf_dist.progress import progress
from cldf_dist.run import Run
from cldf_dist.seeding import sample_seed
from cldf_dist.stopping import Stopped, agreed, stop_signals

Batch = Mapping[str, Any]
# the layout in which convolutions are fastest; torch's types do not know this form of `to`
CHANNELS_LAST: Any = {"memory_format": torch.channels_last}


class Batches(Protocol):
    """What `fit` asks of a stream of training samples."""

    def batches(
        self, consumed: int, *, batch_size: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[Batch]: ...

    def fixed(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[Batch]: ...


def fit(
    task: nn.Module, stream: Batches, settings: Fit, run: Run, validation: Batches | None = None
) -> nn.Module:
    """Train `task` to `settings.steps`; the net (its moving average where asked), frozen.

    Starts from the newest valid checkpoint in `run.folder`. Raises ValueError where the batch does
    not divide over the processes, FloatingPointError after too many non-finite steps in a row, and
    `Stopped` after SIGTERM, SIGUSR1 or Ctrl-C, when everything is saved.
    """
    training = _Training(task, settings, run)
    step = training.resume()
    rank, world_size = processes().rank, processes().world_size
    batches = stream.batches(
        step * settings.batch_size,
        batch_size=settings.batch_size // settings.accumulate,
        rank=rank,
        world_size=world_size,
        num_workers=settings.num_workers,
    )
    shown = run.is_main
    with stop_signals() as asked, progress(run.stage, settings.steps, shown=shown) as bar:
        bar.start_at(step)
        while step < settings.steps:
            training.step(step, batches)
            step += 1
            bar.advance(note=training.note)
            last = step == settings.steps
            if (
                validation
                and settings.validate_every
                and (last or not step % settings.validate_every)
            ):
                training.validate(step, validation)
            if settings.preview_every and not step % settings.preview_every:
                training.preview(step)
            stop = agreed(asked)
            if stop or last or step % settings.checkpoint_every == 0:
                training.save(step)
            if stop and not last:
                raise Stopped(stop, f"after step {step}")
            run.stop_requested = stop
    training.preview(step)
    return training.result()


class _Training:
    """The state between steps: weights, moving average, optimizer, counters."""

    def __init__(self, task: nn.Module, settings: Fit, run: Run) -> None:
        _check_batch(task, settings)
        self.settings, self.run = settings, run
        self.accelerator = accelerator()
        self.device = self.accelerator.device
        self.task: nn.Module = task.to(self.device).to(**CHANNELS_LAST)
        self.average = copy.deepcopy(self.task).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.task.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.autocast = _uses_bf16(run.config.mixed_precision, self.device) and bool(
            getattr(task, "autocast", True)
        )
        if settings.compile:  # the net, not the task: tasks make generators
            net: Any = self.task.net
            net.compile()
        self.wrapped: Any = self.accelerator.prepare_model(self.task)
        self.note = ""
        self.skipped = self.skipped_in_a_row = 0
        self._sums: dict[str, Tensor] = {}
        self._logged = (time.monotonic(), 0)
        self._waited = 0.0

    def resume(self) -> int:
        """Load the newest valid checkpoint; the step it was made at (0 without one)."""
        run_id = from_main(self.run.id if self.run.is_main else "")
        found = newest_checkpoint(self.run.folder / "checkpoints", run_id)
        step = found.state["step"] if found else 0
        if from_main(step) != step:
            raise RuntimeError(
                f"this process finds checkpoint {step}, the main process another; "
                f"is {self.run.folder} on a file system that all processes see?"
            )
        if found:
            self.task.load_state_dict(found.tensors["task"])
            self.average.load_state_dict(found.tensors["average"])
            load_optimizer(self.optimizer, found.tensors["optimizer"])
            self.skipped = found.state["skipped"]
            self.skipped_in_a_row = found.state["skipped_in_a_row"]
            for name, total in found.state["sums"].items():  # over all processes: main takes it on
                mine = total if self.run.is_main else 0.0
                self._sums[name] = torch.tensor(mine, device=self.device)
            if self.run.is_main:
                print(f"{self.run.stage}: resuming after step {step}", file=sys.stderr)
        self._logged = (time.monotonic(), step)
        self.run.start_logging_from(step)
        return int(step)

    def step(self, step: int, batches: Iterator[Batch]) -> None:
        """One optimizer step, whose number among all steps is `step` + 1."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        self.task.train()
        # dropout inside the net draws from the global generator: make it a function of the step
        torch.manual_seed(sample_seed(self.run.config.seed, step, f"rank {processes().rank}"))
        parts = []
        for micro in range(settings.accumulate):
            started = time.monotonic()
            batch = _to(next(batches), self.device)
            self._waited += time.monotonic() - started
            last = micro == settings.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self._autocast():
                    losses = self.wrapped(batch)
                self.accelerator.backward(losses["loss"] / settings.accumulate)
            parts.append(losses)
        if self._update(step, batch):
            for losses in parts:
                self._add(losses)
        self.optimizer.zero_grad(set_to_none=True)
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            self._log(step + 1)

    def _update(self, step: int, batch: Batch) -> bool:
        """Move the weights unless the gradient is not finite; True where they moved."""
        limit = self.settings.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.task.parameters(), limit)
        if bool(torch.isfinite(norm)):  # gradients are averaged over ranks: all decide alike
            self.optimizer.step()
            self._update_average(step)
            self._add({"grad_norm": norm})
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.settings.max_skipped_steps:
            path = self.run.folder / f"bad_batch_rank{processes().rank}.pt"
            torch.save(dict(batch), path)
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient, the last is "
                f"step {step + 1}; its batch is in {path}; lower fit.learning_rate or look at "
                "the data"
            )
        return False

    def _update_average(self, step: int) -> None:
        decay = min(self.settings.average_decay, (1 + step) / (10 + step))  # warm-up
        with torch.no_grad():
            current = [p.detach() for p in self.task.parameters()]
            torch._foreach_lerp_(list(self.average.parameters()), current, 1 - decay)
            for mine, theirs in zip(self.average.buffers(), self.task.buffers()):
                mine.copy_(theirs)

    def validate(self, step: int, validation: Batches) -> None:
        """Mean losses of the averaged net over the same samples and noise each time."""
        sums: dict[str, Tensor] = {}
        place = {"rank": processes().rank, "world_size": processes().world_size}
        per_step = self.settings.batch_size // (processes().world_size * self.settings.accumulate)
        with torch.no_grad(), self._autocast():
            for batch in validation.fixed(self.settings.validation_samples, per_step, **place):
                losses = self.average(_to(batch, self.device))
                size = len(batch["sample_number"])
                for name, value in {**losses, "weight": torch.ones(())}.items():
                    weighted = value.detach().float().to(self.device) * size
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + weighted
        names = from_main(sorted(sums))
        stacked = torch.stack([sums.get(name, torch.zeros(())).to(self.device) for name in names])
        totals = dict(zip(names, self.accelerator.reduce(stacked, "sum").tolist()))
        weight = max(totals.pop("weight"), 1.0)
        self.run.log(step, {f"validation/{name}": total / weight for name, total in totals.items()})

    def preview(self, step: int) -> None:
        """Write the task's pictures, made with the averaged net, as PNG files."""
        if not (self.run.is_main and hasattr(self.task, "preview")):
            return
        from matplotlib import image

        folder = self.run.folder / "previews"
        folder.mkdir(exist_ok=True)
        average: Any = self.average
        for name, picture in average.preview(average.net).items():
            image.imsave(folder / f"{name}-{step:08d}.png", picture, cmap="gray", vmin=0, vmax=255)

    def save(self, step: int) -> None:
        # since the last log: without them the next line of a resumed run would be another mean
        sums = self._totals()
        if self.run.is_main:
            save_checkpoint(
                self.run.folder / "checkpoints",
                self.run.id,
                {
                    "step": step,
                    "skipped": self.skipped,
                    "skipped_in_a_row": self.skipped_in_a_row,
                    "sums": sums,
                    "world_size": processes().world_size,
                },
                {
                    "task": self.task.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": optimizer_tensors(self.optimizer),
                },
                keep=self.settings.keep,
            )
        wait_for_everyone()

    def result(self) -> nn.Module:
        task: Any = self.average if self.settings.average_decay else self.task
        net: nn.Module = task.net
        return net.eval().requires_grad_(False)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums.setdefault(name, torch.zeros((), device=self.device))
            self._sums[name] += value.detach().float()
            count = f"#{name}"
            self._sums.setdefault(count, torch.zeros((), device=self.device))
            self._sums[count] += 1

    def _totals(self) -> dict[str, float]:
        """The sums since the last log, over all processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names])
        return dict(zip(names, self.accelerator.reduce(stacked, "sum").tolist()))

    def _log(self, step: int) -> None:
        totals = self._totals()
        metrics = {
            f"train/{name}": total / totals[f"#{name}"]
            for name, total in totals.items()
            if not name.startswith("#")
        }
        then, step_then = self._logged
        seconds = max(time.monotonic() - then, 1e-9)
        metrics |= {
            "train/learning_rate": learning_rate(step - 1, self.settings),
            "train/skipped_steps": float(self.skipped),
            "speed/slices_per_second": (step - step_then) * self.settings.batch_size / seconds,
            "speed/data_wait_share": self._waited / seconds,
        }
        self.note = f"loss {metrics.get('train/loss', math.nan):.4f}"
        self.run.log(step, metrics)
        self._sums.clear()
        self._logged, self._waited = (time.monotonic(), step), 0.0


def learning_rate(step: int, settings: Fit) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate` of the peak."""
    peak, floor = settings.learning_rate, settings.final_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def _check_batch(task: nn.Module, settings: Fit) -> None:
    world_size = processes().world_size
    if settings.batch_size % (world_size * settings.accumulate):
        raise ValueError(
            f"fit.batch_size ({settings.batch_size}, over all processes) must be a multiple of "
            f"processes x fit.accumulate = {world_size} x {settings.accumulate}"
        )
    if settings.accumulate > 1 and not getattr(task, "accumulates", True):
        raise ValueError(
            f"{type(task).__name__} contrasts within the batch: fit.accumulate must be 1, "
            f"got {settings.accumulate}"
        )


def _uses_bf16(mixed_precision: str, device: torch.device) -> bool:
    # on CPUs without AMX bf16 autocast is many times slower than float32
    return mixed_precision == "bf16" or (mixed_precision == "auto" and device.type == "cuda")


def _to(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True)
        # sample numbers seed generators: on the host they cost no synchronisation
        if isinstance(value, Tensor) and key != "sample_number"
        else value
        for key, value in batch.items()
    }
