"""What one process of a launch measures: steps of `fit`, a bare loop beside the others, all-reduce.

Started by `bench_scaling.py`, alone or by accelerate's launcher; the main process writes JSON.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import train_setup
from stage_work import MadeUp, num_channels

from cldf_dist.config import Config
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator, processes, wait_for_everyone
from cldf_dist.system.process_end import end_process
from cldf_dist.training.checkpoint import save_checkpoint
from cldf_dist.training.fit import Batch, fit

STAGE = "train-diffusion"
Seconds = list[tuple[float, float]]  # of each step, on the wall and of CPU time


def main() -> None:
    """Measure, and write what was found."""
    arguments = _parse_arguments()
    torch.set_num_threads(1)
    case = train_setup.Case(tuple(arguments.config))
    config = case.config(f"runs={arguments.folder}", "tracking.enabled=false")
    device = accelerator().device
    found: dict[str, Any] = {"fit": {}, "apart": {}, "all_reduce": {}}
    with train_setup.arithmetic():
        for batch in arguments.batches:
            local = batch // processes().world_size
            wait_for_everyone()
            found["apart"][local] = _bare_steps(config, local, arguments.steps, device)
            wait_for_everyone()
            found["fit"][batch] = _fit_steps(config, batch, arguments.steps)
    if processes().world_size > 1:
        for size in arguments.sizes:
            found["all_reduce"][size] = _all_reduce_seconds(size, arguments.steps, device)
    elif arguments.checkpoint:
        found["checkpoint"] = _checkpoint_seconds(config, Path(arguments.folder))
    if processes().is_main:
        arguments.output.write_text(json.dumps(found))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True, help="global")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="bytes, of an all-reduce")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint", action="store_true", help="time the writing of one")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def _bare_steps(config: Config, local: int, num_steps: int, device: torch.device) -> Seconds:
    """Nothing is exchanged; processes of a launch do it at the same time."""
    config = _with_batch(config, local)
    task = train_setup.make_task(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = train_setup.BareLoop(task, config)
    batch = train_setup.made_up_batches(config, device, 1)[0]
    return _laps(lambda: loop.step(batch), num_steps, device)


def _fit_steps(config: Config, batch: int, num_steps: int) -> Seconds:
    config = _with_batch(config, batch)
    # two steps set things up, and the last is not followed by a call for a batch
    settings = replace(config.diffusion.fit, steps=num_steps + 3)
    run = Run(config, STAGE, ())
    if processes().is_main:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.open()
    wait_for_everyone()
    stream = _Stamped(num_channels(config), config.data.image_size)
    try:
        fit(train_setup.make_task(config), stream, settings, run)
    finally:
        run.close()
    stamps = stream.stamps[2:]
    return [_since(before, after) for before, after in pairwise(stamps)]


def _with_batch(config: Config, batch: int) -> Config:
    settings = replace(
        config.diffusion.fit,
        batch_size=batch,
        num_workers=0,
        checkpoint_every=0,
        validate_every=0,
        preview_every=0,
    )
    return replace(config, diffusion=replace(config.diffusion, fit=settings))


def _all_reduce_seconds(size: int, count: int, device: torch.device) -> Seconds:
    values = torch.ones(size // 4, device=device)
    return _laps(lambda: torch.distributed.all_reduce(values), count, device)


def _checkpoint_seconds(config: Config, folder: Path) -> Seconds:
    """Of the net's size: weights, moving average and two moments."""
    weights = train_setup.make_task(config).state_dict()
    moments = {f"{name}/{part}": w for name, w in weights.items() for part in ("first", "second")}
    tensors = {"task": weights, "average": weights, "optimizer": moments}
    numbers = iter(range(1, 100))

    def save() -> None:
        state = {"step": next(numbers)}
        save_checkpoint(folder / "checkpoints", "none", state, tensors, keep_checkpoints=2)

    return _laps(save, 3, torch.device("cpu"))


def _laps(call: Any, count: int, device: torch.device) -> Seconds:
    """Seconds of each call after one that is not counted."""
    call()
    stamps = [_now(device)]
    for _ in range(count):
        call()
        stamps.append(_now(device))
    return [_since(before, after) for before, after in pairwise(stamps)]


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _since(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], after[1] - before[1]


class _Stamped(MadeUp):
    """Notes when each batch is asked for."""

    def __init__(self, num_channels: int, side: int) -> None:
        super().__init__(num_channels, side)
        self.stamps: Seconds = []

    def batches(self, consumed: int, **place: Any) -> Iterator[Batch]:
        for batch in super().batches(consumed, **place):
            self.stamps.append(_now(accelerator().device))
            yield batch


if __name__ == "__main__":
    main()
    end_process(0)
