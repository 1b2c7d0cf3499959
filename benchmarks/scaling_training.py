"""What one process of a launch measures: steps of `fit`, a bare loop beside the others, all-reduce.

Started by `bench_scaling.py`, alone or by accelerate's launcher; the main process writes JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from cases import DIFFUSION, BareLoop, Case, Watched, arithmetic, make_task, run_fit
from made_up import MadeUp, batches_on
from measure import Call, alternate, cpu_and_wall

from cldf_dist.config import Config
from cldf_dist.system.distributed import accelerator, processes, wait_for_everyone
from cldf_dist.system.process_end import end_process
from cldf_dist.training.checkpoint import save_checkpoint
from cldf_dist.training.fit import Batch

Seconds = list[tuple[float, float]]  # of each step, of CPU time and on the wall


def main() -> None:
    """Measure on the CPU, and write what was found."""
    arguments = _parse_arguments()
    torch.set_num_threads(1)
    config = Case(tuple(arguments.config)).config_in(arguments.folder)
    device, num_steps = accelerator().device, arguments.steps
    found: dict[str, Any] = {"fit": {}, "apart": {}, "all_reduce": {}}
    with arithmetic():
        for batch in arguments.batches:
            local = batch // processes().world_size
            wait_for_everyone()
            found["apart"][local] = _bare_steps(_with_batch(config, local), num_steps, device)
            wait_for_everyone()
            found["fit"][batch] = _fit_steps(_with_batch(config, batch), num_steps)
    if processes().world_size > 1:
        for size in arguments.sizes:
            values = torch.ones(size // 4, device=device)
            reduce = partial(torch.distributed.all_reduce, values)
            found["all_reduce"][size] = _laps(reduce, num_steps)
    elif arguments.checkpoint:
        found["checkpoint"] = _checkpoint_seconds(config, arguments.folder)
    if processes().is_main:
        arguments.output.write_text(json.dumps(found))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True, help="global")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="bytes, of an all-reduce")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint", action="store_true", help="time the writing of one")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def _with_batch(config: Config, batch: int) -> Config:
    settings = replace(config.diffusion.fit, batch_size=batch, num_workers=0)
    return replace(config, diffusion=replace(config.diffusion, fit=settings))


def _bare_steps(config: Config, num_steps: int, device: torch.device) -> Seconds:
    """Nothing is exchanged; processes of a launch do it at the same time."""
    task = make_task(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop, batch = BareLoop(task, config), batches_on(device, config, 1)[0]
    return _laps(lambda: loop.step(batch), num_steps)


def _fit_steps(config: Config, num_steps: int) -> Seconds:
    """From the moments when batches are asked for."""
    stamps: Seconds = []

    @contextmanager
    def stamped(batch: Batch) -> Iterator[None]:
        stamps.append((time.process_time(), time.perf_counter()))
        yield

    # two steps set things up, and the last is not followed by a call for a batch
    settings = replace(config.diffusion.fit, steps=num_steps + 3)
    stream = Watched(MadeUp(config), stamped)
    run_fit(config, DIFFUSION, make_task(config), stream, settings)
    return [(end[0] - start[0], end[1] - start[1]) for start, end in pairwise(stamps[2:])]


def _checkpoint_seconds(config: Config, folder: Path) -> Seconds:
    """Of the net's size: weights, moving average and two moments."""
    weights = make_task(config).state_dict()
    moments = {f"{name}/{part}": w for name, w in weights.items() for part in ("first", "second")}
    tensors = {"task": weights, "average": weights, "optimizer": moments}
    numbers = count(1)

    def save() -> None:
        state = {"step": next(numbers)}
        save_checkpoint(folder / "checkpoints", "none", state, tensors, keep_checkpoints=2)

    return _laps(save, 3)


def _laps(call: Call, num_calls: int) -> Seconds:
    """Seconds of each call after one that is not counted."""
    return alternate({"": partial(cpu_and_wall, call)}, num_calls, warmup=1)[""]


if __name__ == "__main__":
    main()
    end_process(0)
