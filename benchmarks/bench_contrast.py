"""Speed and memory of the supervised contrastive loss against its definition and its floor.

Ours against the definition (naive, N x N), the compiled definition and pytorch-metric-learning, in
one process and in alternating rounds; medians count. First the ceilings of the device, then for
every size the floor: the operations that the loss needs, at those rates. On CPU one thread and its
CPU time; on CUDA the time on the device, the L2 cache flushed before every step. One CSV row per
implementation, size and pass is appended to --output. An implementation that would take too much
time or memory at a size is left out there, and the reason printed.

    python benchmarks/bench_contrast.py --pixels 1024 4096 8192
    python benchmarks/bench_contrast.py --device cuda --pixels 4096 16384 65536 262144 \
        --features 32 64 128 256 --plot benchmarks/results/contrast_cuda.png
    python benchmarks/bench_contrast.py --plot-only --device cpu --plot contrast.png
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import contrast_plot
import torch
from cldf_kernels import supcon_loss, supcon_reference
from contrast_floor import PASSES, PRECISIONS, Ceilings, measure_ceilings
from harness import Benchmark
from measure import free_bytes, medians, peaks_mb, seconds_of
from torch import Tensor
from torch.nn.functional import normalize

# seconds are medians; the peak is above what was held before the step; ratios are empty without
# the naive form
COLUMNS = (
    *("date", "commit", "command", "device", "driver", "torch", "triton"),
    *("implementation", "pass", "N", "D", "precision"),
    *("seconds", "ratio_to_naive", "times_floor", "peak_extra_mb"),
)
NAMES = ("naive", "compiled naive", "pytorch-metric-learning", "ours")
TEMPERATURE = 0.07
FREE_FRACTION = 0.8  # of the free memory that a step may take
TURN_SECONDS, TURN_STEPS = 0.02, 20  # a turn repeats its step until it reaches either
Loss = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


@dataclass
class Implementation:
    """One way to compute the loss, and what was measured of it at the latest size."""

    name: str
    loss: Loss
    precision: str = "fp32"
    num_matrices: int = 0  # float32 N x N matrices that it holds at once, rounded up
    is_compiled: bool = False
    num_pixels: int = 0
    seconds: list[float] = field(default_factory=list)  # of each of PASSES
    peaks: list[float] = field(default_factory=list)  # MB


@dataclass(frozen=True)
class Plan:
    """Where and how often to measure."""

    device: torch.device
    num_rounds: int
    max_seconds: float  # of one implementation at one size


def main() -> None:
    """Measure, append the rows, plot; what the options leave out is left out."""
    bench = Benchmark(__file__, __doc__, COLUMNS)
    arguments = _parse(bench)
    if not arguments.plot_only:
        bench.begin()
        _measure(bench)
    if arguments.plot:
        try:
            panels = contrast_plot.read_panels(
                arguments.output, arguments.device, arguments.features
            )
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"bench_contrast.py: {error}")
        contrast_plot.draw_panels(panels, arguments.plot)
        print(f"plotted to {arguments.plot}")


def _parse(bench: Benchmark) -> argparse.Namespace:
    bench.shared_options("device", "tiny")
    bench.option("--pixels", type=int, nargs="+", metavar="N", help="default 1024 4096 8192")
    bench.option("--features", type=int, nargs="+", metavar="D", help="default 64; plotted: all")
    bench.option(
        "--precision", choices=PRECISIONS, nargs="+", help="of ours on CUDA, default fp16 bf16 tf32"
    )
    bench.option("--implementations", choices=NAMES, nargs="+", help="default all")
    bench.numbers(rounds=(5, "of which the median counts"))
    bench.option(
        "--max-seconds",
        type=float,
        default=300,
        help="of one implementation at one size, foreseen from a smaller size; default %(default)s",
    )
    bench.option("--plot", type=Path, metavar="PNG", help="draw the latest rows of --output")
    bench.option("--plot-only", action="store_true", help="measure nothing")
    arguments = bench.parse()
    if arguments.plot_only and not arguments.plot:
        bench.parser.error("--plot-only needs --plot")
    if arguments.tiny and arguments.pixels:
        bench.parser.error("--tiny chooses the pixels; leave --pixels out")
    if arguments.precision and arguments.device == "cpu":
        bench.parser.error("--precision belongs to --device cuda; on CPU all is computed in fp32")
    return arguments


def _measure(bench: Benchmark) -> None:
    """Every number of features, and for each the sizes, the smallest first."""
    arguments = bench.arguments
    plan = Plan(bench.device, arguments.rounds, arguments.max_seconds)
    torch.manual_seed(0)
    ceilings = measure_ceilings(plan.device, tiny=arguments.tiny)
    precisions = arguments.precision or ["fp16", "bf16", "tf32"]
    not_tiny = [name for name in NAMES if name != "compiled naive"]
    names = arguments.implementations or (not_tiny if arguments.tiny else NAMES)
    sizes = arguments.pixels or ([64, 128] if arguments.tiny else [1024, 4096, 8192])
    for num_features in arguments.features or [64]:
        remaining = find_implementations(names, plan.device, precisions)
        for num_pixels in sorted(sizes):
            print(f"\nN={num_pixels} D={num_features}, floor: {ceilings.form}")
            selected = select(remaining, num_pixels, plan)
            measured = measure(selected, num_pixels, num_features, plan)
            # what failed is not tried again at larger sizes
            remaining = [one for one in remaining if one in measured or one not in selected]
            _add_rows(bench, measured, num_features, ceilings)


def _add_rows(
    bench: Benchmark, measured: list[Implementation], num_features: int, ceilings: Ceilings
) -> None:
    naive = next((one for one in measured if one.name == "naive"), None)
    for one in measured:
        floors = ceilings.floors(one.num_pixels, num_features, one.precision)
        for number, name in enumerate(PASSES):
            seconds = one.seconds[number]
            bench.add(
                **{"implementation": one.name, "pass": name},
                N=one.num_pixels,
                D=num_features,
                precision=one.precision,
                seconds=seconds,
                ratio_to_naive=naive.seconds[number] / seconds if naive else None,
                times_floor=seconds / floors[number],
                peak_extra_mb=one.peaks[number],
            )


def find_implementations(
    names: Iterable[str], device: torch.device, precisions: Sequence[str]
) -> list[Implementation]:
    """Those of NAMES that are asked for and installed; on CUDA, ours once per precision and once
    deterministic, in the first precision."""
    found: list[Implementation] = []
    for name in (name for name in NAMES if name in names):
        if name == "naive":
            found.append(Implementation(name, _naive, num_matrices=6))
        elif name == "compiled naive":
            compiled = torch.compile(_naive, dynamic=False)
            found.append(Implementation(name, compiled, num_matrices=3, is_compiled=True))
        elif name == "pytorch-metric-learning":
            try:
                from pytorch_metric_learning.losses import SupConLoss
            except ImportError:
                print(f"{name}: left out, not installed")
                continue
            found.append(Implementation(name, SupConLoss(temperature=TEMPERATURE), num_matrices=12))
        elif device.type == "cpu":
            found.append(Implementation(name, partial(supcon_loss, temperature=TEMPERATURE)))
        else:
            found += [_ours(f"ours {precision}", precision) for precision in precisions]
            found.append(_ours("ours deterministic", precisions[0], deterministic=True))
    return found


def select(
    implementations: list[Implementation], num_pixels: int, plan: Plan
) -> list[Implementation]:
    """Those for which memory and time suffice; prints why the others are left out."""
    reasons = {one.name: _reason_to_skip(one, num_pixels, plan) for one in implementations}
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: left out, {reason}")
    return [one for one in implementations if not reasons[one.name]]


def measure(
    implementations: list[Implementation], num_pixels: int, num_features: int, plan: Plan
) -> list[Implementation]:
    """Fill in medians over all steps of the alternating rounds, and peaks of memory.

    What runs out of memory or cannot be compiled is not returned, and the reason printed.
    """
    z = normalize(torch.randn(num_pixels, num_features, device=plan.device), dim=1)
    z.requires_grad_()
    labels = torch.randint(0, 2, (num_pixels,), device=plan.device)
    running: list[Implementation] = []
    steps: dict[str, list[list[float]]] = {}
    for one in implementations:
        peaks = _attempt(_warm_up, one, z, labels)
        if peaks is not None:
            running.append(one)
            one.num_pixels, one.peaks, steps[one.name] = num_pixels, peaks, []
    for _ in range(plan.num_rounds):
        for one in list(running):
            turn = _attempt(_take_turn, one, z, labels)
            if turn is None:
                running.remove(one)
            else:
                steps[one.name] += turn
    for one in running:
        one.seconds = medians(steps[one.name])
    return running


def _naive(z: Tensor, labels: Tensor) -> Tensor:
    return supcon_reference(z, labels, temperature=TEMPERATURE)


def _ours(name: str, precision: Any, *, deterministic: bool = False) -> Implementation:
    loss = partial(
        supcon_loss, temperature=TEMPERATURE, precision=precision, deterministic=deterministic
    )
    return Implementation(name, loss, precision)


def _reason_to_skip(one: Implementation, num_pixels: int, plan: Plan) -> str:
    needed, free = one.num_matrices * 4 * num_pixels**2, free_bytes(plan.device)
    if needed > FREE_FRACTION * free:
        return (
            f"its N x N matrices need about {needed / 2**30:.1f} GiB, more than {FREE_FRACTION:.0%}"
            f" of the {free / 2**30:.1f} GiB that are free"
        )
    if not one.seconds:
        return ""
    step = one.seconds[-1] * (num_pixels / one.num_pixels) ** 2  # time grows with N^2
    seconds = step * (plan.num_rounds + 2)  # the warm-up, the step for the memory, the rounds
    if seconds > plan.max_seconds:
        return f"it would take about {seconds:.3g} s, more than --max-seconds {plan.max_seconds:g}"
    return ""


def _attempt(
    call: Callable[[Implementation, Tensor, Tensor], Result],
    one: Implementation,
    z: Tensor,
    labels: Tensor,
) -> Result | None:
    """The result; None, and the reason printed, without memory or a working compiler."""
    try:
        return call(one, z, labels)
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # on CPU
        )
        if not (out_of_memory or one.is_compiled):
            raise
        what = "out of memory" if out_of_memory else "torch.compile failed"
        reason = " ".join(str(error).split("\n\n")[0].split())
    z.grad = None
    print(f"{one.name}: left out, {what}: {reason[:200]}")
    return None


def _warm_up(one: Implementation, z: Tensor, labels: Tensor) -> list[float]:
    """Peak memory of a second step, after the first one compiled or loaded what it needs.

    What the forward saves counts in the backward too.
    """
    if one.is_compiled:
        torch.compiler.reset()  # a size too many, and torch would stop compiling without a word
    start = time.perf_counter()
    seconds_of(z.device, *_laps(one.loss, z, labels))
    if one.is_compiled:
        seconds = time.perf_counter() - start
        print(f"{one.name}: {seconds:.1f} s (wall) to compile, not counted")
    peaks = peaks_mb(z.device, *_laps(one.loss, z, labels))
    return [*peaks, max(peaks)]


def _take_turn(one: Implementation, z: Tensor, labels: Tensor) -> list[list[float]]:
    """Seconds of each of PASSES in a step, or in several of a short one."""
    steps: list[list[float]] = []
    while len(steps) < TURN_STEPS and sum(step[-1] for step in steps) < TURN_SECONDS:
        laps = seconds_of(z.device, *_laps(one.loss, z, labels))
        steps.append([*laps, sum(laps)])
    return steps


def _laps(loss: Loss, z: Tensor, labels: Tensor) -> list[Callable[[], object]]:
    """A forward without gradient from earlier steps, and the backward of what it returned."""
    z.grad = None
    values: list[Tensor] = []
    return [lambda: values.append(loss(z, labels)), lambda: values.pop().backward()]


if __name__ == "__main__":
    main()
