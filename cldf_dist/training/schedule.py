"""The learning rate of a step, and the check of the batch size."""

from __future__ import annotations

import math

from cldf_dist.config import Fit


def learning_rate(step: int, settings: Fit) -> float:
    """The learning rate: linear warm-up, then cosine decay to a fraction of the peak.

    The fraction is `final_learning_rate_fraction`.
    """
    peak, floor = settings.learning_rate, settings.final_learning_rate_fraction
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def check_batch(path: str, settings: Fit, world_size: int) -> None:
    """Raise ValueError unless the global batch divides over processes and micro-batches.

    `path` is the dotted path of the settings, for the message.
    """
    parts = settings.gradient_accumulation_steps
    if settings.batch_size % (world_size * parts):
        raise ValueError(
            f"{path}.batch_size ({settings.batch_size}, over all processes) must be a multiple of "
            f"processes x {path}.gradient_accumulation_steps = {world_size} x {parts}"
        )
