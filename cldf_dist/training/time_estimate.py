"""An estimate of a training's duration: one real step on random slices, extrapolated."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from cldf_dist.config import Fit
from cldf_dist.system.distributed import accelerator, processes


def training_time(task: nn.Module, fit: Fit, num_channels: int, image_size: int) -> dict[str, str]:
    """The number of parameters and the estimated time of all steps, as text for `--dry-run`.

    Extrapolated from one timed slice in single precision, without loader and optimizer: an order
    of magnitude.
    """
    device = accelerator().device
    task = task.to(device).train()
    batch = {
        "image": torch.rand(1, num_channels, image_size, image_size, device=device) * 2 - 1,
        "label": torch.ones(1, dtype=torch.long, device=device),
        "sample_number": torch.zeros(1, dtype=torch.long),
    }
    _seconds_of_step(task, batch)  # the first one also sets things up
    seconds = _seconds_of_step(task, batch) * fit.steps * fit.batch_size / processes().world_size
    parameters = sum(p.numel() for p in task.parameters())
    return {
        "net": f"{parameters / 1e6:.2f} million parameters",
        "time": f"about {in_words(seconds)} on this machine's {device.type}, "
        f"{processes().world_size} process(es)",
    }


def _seconds_of_step(task: nn.Module, batch: dict[str, Any]) -> float:
    started = time.perf_counter()
    task(batch)["loss"].backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_words(seconds: float) -> str:
    """A duration as text, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
