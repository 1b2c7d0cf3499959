"""The same training step, faster rung by rung: precision, layout, compiler, optimizer, graphs.

Every rung is the bare loop on batches that lie on the device already, and is measured alone: what
came before it is freed. The last measurement is a real `fit` with loader processes.
"""

import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from train_setup import BareLoop, arithmetic, made_up_batches, make_task, meta_net

from cldf_dist.config import Config
from cldf_dist.nets.attention import use_attention, xformers_fault
from cldf_dist.runs.run import Run
from cldf_dist.training.fit import fit
from cldf_dist.training.on_slices import shard_set, training_stream

NUM_BATCHES = 4  # in turn
STAGE = "train-diffusion"


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
    Rung(
        "bf16, compile, fused AdamW, CUDA graphs",
        "bf16",
        compile_mode="reduce-overhead",
        fused=True,
    ),
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
    _free(plan.device)
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
        _free(plan.device)


def measure_loaded(config: Config, plan: Plan, num_workers: int, *, compiled: bool) -> Speed:
    """`fit` with loader processes, from its own log: the median of its lines after the warm-up."""
    settings = replace(
        config.diffusion.fit,
        steps=plan.warmup + plan.rounds * plan.steps,
        log_every=plan.steps,
        num_workers=num_workers,
        compile=compiled,
        checkpoint_every=0,
        validate_every=0,
        preview_every=0,
    )
    precision = "bf16" if plan.device.type == "cuda" else "no"
    diffusion = replace(config.diffusion, fit=settings)
    config = replace(config, diffusion=diffusion, mixed_precision=precision)
    shutil.rmtree(config.run_folder / STAGE, ignore_errors=True)
    run = Run(config, STAGE, ("diffusion",), ("prepare",))
    run.open()
    try:
        stream = training_stream(config, shard_set(config, run), config.diffusion.augment)
        with arithmetic():
            fit(make_task(config), stream, settings, run)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    finally:
        run.close()
    return _from_log([json.loads(line) for line in lines], settings.batch_size, plan)


def _from_log(lines: list[dict[str, Any]], batch_size: int, plan: Plan) -> Speed:
    # the line that the warm-up ends in holds some of it
    settled = [line for line in lines if line["step"] - plan.steps >= plan.warmup]
    rate, share, memory = (
        statistics.median(line[f"speed/{name}"] for line in settled)
        for name in ("slices_per_second", "data_wait_fraction", "memory_gb")
    )
    return Speed(batch_size / rate, memory if plan.device.type == "cuda" else None, share)


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
    task = make_task(config).to(plan.device)
    if rung.channels_last:
        task = task.to(memory_format=torch.channels_last)
    use_attention(task.net, rung.attention)
    if rung.compile_mode:
        task.net.compile(mode=rung.compile_mode)
    loop = BareLoop(task, config, fused=rung.fused, dtype=rung.dtype)
    batches = cycle(made_up_batches(config, plan.device, NUM_BATCHES))

    def steps(num_steps: int) -> Callable[[], None]:
        def take() -> None:
            for _ in range(num_steps):
                if rung.compile_mode == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                loop.step(next(batches))

        return take

    steps(plan.warmup)()
    on_gpu = plan.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(plan.device)
    seconds = [_seconds(plan.device, steps(plan.steps)) for _ in range(plan.rounds)]
    peak = torch.cuda.max_memory_allocated(plan.device) / 1e9 if on_gpu else None
    return Speed(statistics.median(seconds) / plan.steps, peak)


def _seconds(device: torch.device, call: Callable[[], None]) -> float:
    if device.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
