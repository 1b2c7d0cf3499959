"""The same training step, faster rung by rung: precision, layout, compiler, optimizer, graphs.

Every rung is the bare loop on batches that lie on the device already, and is measured alone: what
came before it is freed. The last measurement is a real `fit` with loader processes.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from cases import DIFFUSION, BareLoop, arithmetic, make_task, meta_net, run_fit
from made_up import batches_on
from measure import peak_bytes, reset_peak, seconds_of

from cldf_dist.config import Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.nets.attention import use_attention, xformers_fault
from cldf_dist.training.on_slices import training_stream

NUM_BATCHES = 4  # in turn
GRAPHS = "reduce-overhead"


@dataclass(frozen=True)
class Rung:
    name: str
    precision: str  # fp32, tf32 or bf16 (autocast)
    channels_last: bool = False
    compile_mode: str = ""  # of torch.compile; empty: eager
    fused: bool = False  # AdamW in one kernel
    attention: str = "sdpa"

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


RUNGS = (
    Rung("eager fp32", "fp32"),
    Rung("TF32", "tf32"),
    Rung("bf16", "bf16"),
    Rung("bf16, channels_last", "bf16", channels_last=True),
    Rung("bf16, xformers", "bf16", attention="xformers"),
    Rung("bf16, fused AdamW", "bf16", fused=True),
    Rung("bf16, compile", "bf16", compile_mode="default"),
    Rung("bf16, compile, fused AdamW", "bf16", compile_mode="default", fused=True),
    Rung("bf16, compile, fused AdamW, CUDA graphs", "bf16", compile_mode=GRAPHS, fused=True),
    Rung("bf16, channels_last, compile", "bf16", channels_last=True, compile_mode="default"),
)


@dataclass(frozen=True)
class Plan:
    device: torch.device
    warmup: int  # steps
    steps: int
    rounds: int  # the median counts


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step; `seconds` on the CUDA device, or of CPU time."""

    seconds: float
    peak_gb: float | None
    data_wait_fraction: float | None = None


def measure_rung(rung: Rung, config: Config, plan: Plan) -> Speed | str:
    """The speed, or why there is none."""
    fault = _fault(rung, config, plan.device)
    if fault:
        return fault
    reset_peak(plan.device)
    try:
        with arithmetic(tf32=rung.precision != "fp32"):
            return _measured(rung, config, plan)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {_first_line(error)}"
    except Exception as error:
        if not rung.compile_mode:
            raise
        return f"torch.compile failed: {_first_line(error)}"  # with whatever kind of error
    finally:
        if rung.compile_mode:
            torch.compiler.reset()
        reset_peak(plan.device)


def measure_loaded(config: Config, plan: Plan, num_workers: int, *, compiled: bool) -> Speed:
    """`fit` with loader processes on the prepared slices, from its own log: medians of its lines
    after the warm-up."""
    settings = replace(
        config.diffusion.fit,
        steps=plan.warmup + plan.rounds * plan.steps,
        log_every=plan.steps,
        num_workers=num_workers,
        compile=compiled,
    )
    on_gpu = plan.device.type == "cuda"
    config = replace(config, mixed_precision="bf16" if on_gpu else "no")
    shards = ShardSet(config.run_folder / "prepare")
    stream = training_stream(config, shards, config.diffusion.augment)
    with arithmetic():
        lines = run_fit(config, DIFFUSION, make_task(config), stream, settings)
    # the line that the warm-up ends in holds some of it
    settled = [line for line in lines if line["step"] - plan.steps >= plan.warmup]
    rate, waited, memory = (
        statistics.median(line[f"speed/{name}"] for line in settled)
        for name in ("slices_per_second", "data_wait_fraction", "memory_gb")
    )
    return Speed(settings.batch_size / rate, memory if on_gpu else None, waited)


def _fault(rung: Rung, config: Config, device: torch.device) -> str:
    if rung.precision == "tf32" and device.type != "cuda":
        return "only CUDA devices have TF32"
    if rung.compile_mode and device.type != "cuda":
        return "torch.compile and CUDA graphs are measured on CUDA only"
    if rung.attention == "xformers":
        fault = xformers_fault(meta_net(config), device, rung.dtype or torch.float32)
        return f"xformers {fault}" if fault else ""
    return ""


def _measured(rung: Rung, config: Config, plan: Plan) -> Speed:
    task: Any = make_task(config).to(plan.device)
    if rung.channels_last:
        task = task.to(memory_format=torch.channels_last)
    use_attention(task.net, rung.attention)
    if rung.compile_mode:
        task.net.compile(mode=rung.compile_mode)
    loop = BareLoop(task, config, fused=rung.fused, dtype=rung.dtype)
    batches = cycle(batches_on(plan.device, config, NUM_BATCHES))

    def steps(num_steps: int) -> None:
        for _ in range(num_steps):
            if rung.compile_mode == GRAPHS:
                torch.compiler.cudagraph_mark_step_begin()
            loop.step(next(batches))

    steps(plan.warmup)
    reset_peak(plan.device)
    taken: Callable[[], None] = partial(steps, plan.steps)
    seconds = [seconds_of(plan.device, taken)[0] for _ in range(plan.rounds)]
    peak = peak_bytes(plan.device) / 1e9 if plan.device.type == "cuda" else None
    return Speed(statistics.median(seconds) / plan.steps, peak)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
