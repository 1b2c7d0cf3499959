"""Metrics of the training steps, accumulated on the device.

Reading them at each step would synchronise host and device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldf_dist.system.distributed import accelerator, processes

Batch = Mapping[str, Any]
Values = Mapping[str, Tensor]


class StepMeans:
    """Means of losses and gradient norm over the steps since the last log that moved weights."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # the number of steps first

    def add(self, micro_batches: Sequence[Values], norm: Tensor, moved: Tensor) -> None:
        """Add one step: the mean over its micro-batches' values, unless the step was skipped."""
        self._names = [*micro_batches[0], "grad_norm"]
        parts = [torch.stack([v.detach().float() for v in part.values()]) for part in micro_batches]
        mean = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
        values = torch.cat([torch.ones(1, device=self._device), mean, norm.detach().float()[None]])
        values = torch.where(moved, values, 0.0)
        self._sums = values if self._sums is None else self._sums + values

    def over_processes(self) -> dict[str, float]:
        """The means over all processes; resets the sums. Empty where no step moved the weights."""
        if self._sums is None:
            return {}
        count, *sums = accelerator().reduce(self._sums, "sum").tolist()
        self._sums = None
        return {name: total / count for name, total in zip(self._names, sums)} if count else {}

    def state(self) -> dict[str, Any]:
        """This process's sums, as plain numbers."""
        return {
            "names": self._names,
            "sums": [] if self._sums is None else self._sums.tolist(),
        }

    def load(self, by_rank: Sequence[Mapping[str, Any]]) -> None:
        """Restore the `state` of each process.

        With another number of processes the main one takes the sums of all.
        """
        rank, world_size = processes().rank, processes().world_size
        if len(by_rank) == world_size:
            mine: Sequence[Mapping[str, Any]] = [by_rank[rank]]
        else:
            mine = by_rank if rank == 0 else []
        self._names = list(by_rank[0]["names"])
        sums = [torch.tensor(part["sums"]) for part in mine if part["sums"]]
        if sums:
            self._sums = torch.stack(sums).sum(0).to(self._device)
        elif by_rank[0]["sums"]:
            self._sums = torch.zeros(len(self._names) + 1, device=self._device)


class SkippedSteps:
    """A counter of steps with a non-finite gradient, which stops a training after too many.

    On a GPU the count is read one step late, so that the host does not wait.
    """

    def __init__(self, device: torch.device, limit: int, folder: Path) -> None:
        self._limit, self._folder = limit, folder
        self._on_gpu = device.type == "cuda"
        self.delay = 1 if self._on_gpu else 0  # steps
        self._total = torch.zeros((), dtype=torch.long, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self._unread: deque[tuple[int, Sequence[Batch], Tensor, Any]] = deque()

    @property
    def total(self) -> int:
        """The number of skipped steps so far."""
        return int(self._total)

    def note(self, step: int, batches: Sequence[Batch], moved: Tensor) -> None:
        """Count a step; after too many skipped in a row raises FloatingPointError.

        The batches of the last of them are then saved in the run's folder.
        """
        skipped = (~moved).long()
        self._total = self._total + skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._unread.append((step, batches, *self._on_its_way(self._in_a_row)))
        while len(self._unread) > self.delay:
            self._look(*self._unread.popleft())

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": int(self._total), "skipped_in_a_row": int(self._in_a_row)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the counts of a checkpoint."""
        self._total.fill_(state["skipped"])
        self._in_a_row.fill_(state["skipped_in_a_row"])

    def _on_its_way(self, value: Tensor) -> tuple[Tensor, Any]:
        if not self._on_gpu:
            return value, None
        copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return copy, arrived

    def _look(self, step: int, batches: Sequence[Batch], in_a_row: Tensor, arrived: Any) -> None:
        if arrived is not None:
            arrived.synchronize()
        if int(in_a_row) <= self._limit:
            return
        path = self._folder / f"bad_batch_rank{processes().rank}.pt"
        torch.save([dict(batch) for batch in batches], path)
        raise FloatingPointError(
            f"{int(in_a_row)} steps in a row had a non-finite gradient, the last is "
            f"step {step + 1}; its batches are in {path}; lower fit.learning_rate or check the "
            "data"
        )
