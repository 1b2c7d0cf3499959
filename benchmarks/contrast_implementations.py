"""The implementations of the loss that are compared, and their measurement at one size."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from cldf_kernels import supcon_loss, supcon_reference
from contrast_device import (
    PASSES,
    Loss,
    Pass,
    free_bytes,
    step_peaks_mb,
    step_seconds,
)
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 0.07
NUM_CLASSES = 2
NAMES = ("naive", "compiled naive", "pytorch-metric-learning", "ours")
FREE_SHARE = 0.8  # of the free memory that a step may take
TURN_SECONDS, TURN_STEPS = 0.02, 20  # a turn repeats its step until it reaches either
Precision = Literal["fp16", "bf16", "tf32", "fp32"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Implementation:
    """One way to compute the loss."""

    name: str
    loss: Loss
    precision: Precision = "fp32"
    num_matrices: int = 0  # float32 N x N matrices that it holds at once, rounded up
    is_compiled: bool = False


@dataclass(frozen=True)
class Plan:
    """Where and how often to measure."""

    device: torch.device
    num_rounds: int
    max_seconds: float  # of one implementation at one size


@dataclass(frozen=True)
class Measured:
    """Medians and peaks of one implementation at one size."""

    implementation: Implementation
    num_pixels: int
    num_features: int
    seconds: dict[Pass, float]
    peaks_mb: dict[Pass, float]


def find_implementations(
    names: Iterable[str], device: torch.device, precisions: list[Precision]
) -> list[Implementation]:
    """Those of NAMES that are asked for and installed; on CUDA, ours once per precision and once
    deterministic, in the first precision."""
    found: list[Implementation] = []
    for name in NAMES:
        if name not in names:
            continue
        if name == "naive":
            found.append(Implementation(name, _naive, num_matrices=6))
        elif name == "compiled naive":
            compiled = torch.compile(_naive, dynamic=False)
            found.append(Implementation(name, compiled, num_matrices=3, is_compiled=True))
        elif name == "pytorch-metric-learning":
            found += _metric_learning(name)
        elif device.type == "cpu":
            found.append(_ours(name, None))
        else:
            found += [_ours(f"ours {precision}", precision) for precision in precisions]
            found.append(_ours("ours deterministic", precisions[0], deterministic=True))
    return found


def select(
    implementations: list[Implementation],
    num_pixels: int,
    smaller: dict[str, Measured],
    plan: Plan,
) -> list[Implementation]:
    """Those for which memory and time suffice; prints why the others are left out.

    Time is foreseen from the latest `smaller` size, by name, and grows with N^2.
    """
    selected = []
    for implementation in implementations:
        reason = _reason_to_skip(implementation, num_pixels, smaller, plan)
        if reason is None:
            selected.append(implementation)
        else:
            print(f"{implementation.name}: left out, {reason}")
    return selected


def measure(
    implementations: list[Implementation],
    num_pixels: int,
    num_features: int,
    plan: Plan,
) -> list[Measured]:
    """Medians over all steps of the alternating rounds.

    What runs out of memory or cannot be compiled is missing, and the reason printed.
    """
    z = normalize(torch.randn(num_pixels, num_features, device=plan.device), dim=1)
    z.requires_grad_()
    labels = torch.randint(0, NUM_CLASSES, (num_pixels,), device=plan.device)
    peaks: dict[str, dict[Pass, float]] = {}
    steps: dict[str, list[dict[Pass, float]]] = {}
    running = []
    for implementation in implementations:
        found = _attempt(_warm_up, implementation, z, labels)
        if found is not None:
            peaks[implementation.name], steps[implementation.name] = found, []
            running.append(implementation)
    for _ in range(plan.num_rounds):
        for implementation in list(running):
            turn = _attempt(_take_turn, implementation, z, labels)
            if turn is None:
                running.remove(implementation)
            else:
                steps[implementation.name] += turn
    return [
        Measured(
            implementation,
            num_pixels,
            num_features,
            {
                name: statistics.median(step[name] for step in steps[implementation.name])
                for name in PASSES
            },
            peaks[implementation.name],
        )
        for implementation in running
    ]


def _naive(z: Tensor, labels: Tensor) -> Tensor:
    return supcon_reference(z, labels, temperature=TEMPERATURE)


def _metric_learning(name: str) -> list[Implementation]:
    try:
        losses = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError:
        print(f"{name}: left out, not installed")
        return []
    return [Implementation(name, losses.SupConLoss(temperature=TEMPERATURE), num_matrices=12)]


def _ours(name: str, precision: Precision | None, *, deterministic: bool = False) -> Implementation:
    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return supcon_loss(
            z,
            labels,
            temperature=TEMPERATURE,
            precision=precision or "auto",
            deterministic=deterministic,
        )

    return Implementation(name, loss, precision or "fp32")


def _reason_to_skip(
    implementation: Implementation, num_pixels: int, smaller: dict[str, Measured], plan: Plan
) -> str | None:
    needed = implementation.num_matrices * 4 * num_pixels**2
    free = free_bytes(plan.device)
    if needed > FREE_SHARE * free:
        return (
            f"its N x N matrices need about {needed / 2**30:.1f} GiB, more than {FREE_SHARE:.0%} "
            f"of the {free / 2**30:.1f} GiB that are free"
        )
    if implementation.name not in smaller:
        return None
    last = smaller[implementation.name]
    step = last.seconds["both"] * (num_pixels / last.num_pixels) ** 2
    seconds = step * (plan.num_rounds + 2)  # the warm-up, the step for the memory, the rounds
    if seconds > plan.max_seconds:
        return f"it would take about {seconds:.3g} s, more than --max-seconds {plan.max_seconds:g}"
    return None


def _attempt(
    call: Callable[[Implementation, Tensor, Tensor], Result],
    implementation: Implementation,
    z: Tensor,
    labels: Tensor,
) -> Result | None:
    """The result; None, and the reason printed, without memory or a working compiler."""
    try:
        return call(implementation, z, labels)
    except Exception as error:
        out_of_memory = _is_out_of_memory(error)
        if not (out_of_memory or implementation.is_compiled):
            raise
        what = "out of memory" if out_of_memory else "torch.compile failed"
        reason = " ".join(str(error).split("\n\n")[0].split())
    z.grad = None
    print(f"{implementation.name}: left out, {what}: {reason[:200]}")
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # on CPU


def _warm_up(implementation: Implementation, z: Tensor, labels: Tensor) -> dict[Pass, float]:
    """Peak memory of a second step, after the first one compiled or loaded what it needs."""
    if implementation.is_compiled:
        torch.compiler.reset()  # a size too many, and torch would stop compiling without a word
    start = time.perf_counter()
    step_seconds(implementation.loss, z, labels)
    if implementation.is_compiled:
        seconds = time.perf_counter() - start
        print(f"{implementation.name}: {seconds:.1f} s (wall) to compile, not counted")
    return step_peaks_mb(implementation.loss, z, labels)


def _take_turn(
    implementation: Implementation, z: Tensor, labels: Tensor
) -> list[dict[Pass, float]]:
    """A step, or several of a short one."""
    steps: list[dict[Pass, float]] = []
    while len(steps) < TURN_STEPS and sum(step["both"] for step in steps) < TURN_SECONDS:
        steps.append(step_seconds(implementation.loss, z, labels))
    return steps
