"""The processes of a launch: rank and world size, and objects sent between them.

The launcher (accelerate, torchrun) sets the environment; without one there is one process.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    """The place of a process in the launch."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


def processes() -> Processes:
    """This process's place in the launch, from the launcher's environment; imports no torch."""
    environment = os.environ
    return Processes(
        rank=int(environment.get("RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
    )


# seconds that a collective may take; long, because others may wait for work of the main process
TIMEOUT = "CLDF_TIMEOUT_SECONDS"
LONGEST = timedelta(hours=24)
ZERO_STAGES = (1, 2)


@functools.cache
def accelerator() -> Accelerator:
    """The Accelerator of this process, created once; it starts the process group.

    Raises RuntimeError where the launcher started more processes than accelerate sees: they would
    train independently, each as rank 0 of 1 (accelerate's launcher does that on CPUs by default).
    Raises ValueError for kinds of sharding that `fit` does not support.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU")
    if _uses_deepspeed():
        _prepare_deepspeed(on_gpu)
    # without the backend DeepSpeed's ranks would each be rank 0 of 1 on CPUs
    group = InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=_timeout())
    # mixed precision is fit()'s own autocast: a task may refuse it
    several = processes().world_size > 1 or _uses_deepspeed()
    result = Accelerator(mixed_precision="no", kwargs_handlers=[group] if several else [])
    expected, kind = processes().world_size, result.distributed_type.value
    if result.num_processes != expected or (expected > 1 and kind == "NO"):
        raise RuntimeError(
            f"the launcher started {expected} processes, but accelerate would train each alone; "
            "on CPUs set ACCELERATE_USE_CPU=true and use configs/accelerate/cpu.yaml (with "
            "zero1.yaml and zero2.yaml that variable must not be set)"
        )
    _check_sharding(kind, result)
    return result


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT)
    return timedelta(seconds=float(given)) if given else LONGEST


def zero_stage() -> int:
    """1 or 2 where DeepSpeed shards the optimizer state over the processes, else 0."""
    plugin = accelerator().state.deepspeed_plugin if _uses_deepspeed() else None
    return int(plugin.zero_stage) if plugin is not None else 0


def _uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def _prepare_deepspeed(on_gpu: bool) -> None:
    """Set the environment and logging that DeepSpeed reads on import."""
    if os.environ.get("ACCELERATE_USE_CPU"):
        raise RuntimeError(
            "ACCELERATE_USE_CPU disables DeepSpeed silently; unset it for zero1.yaml and zero2.yaml"
        )
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import sets it to INFO
    if not on_gpu:
        # a shared-memory collective that would be compiled now, for minutes; gloo serves as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_sharding(kind: str, made: Accelerator) -> None:
    remedy = "use configs/accelerate/ddp.yaml, zero1.yaml or zero2.yaml"
    if kind in ("FSDP", "MEGATRON_LM", "TP"):
        raise ValueError(f"training does not support {kind}; {remedy}")
    if kind != "DEEPSPEED":
        return
    stage = made.state.deepspeed_plugin.zero_stage
    if stage not in ZERO_STAGES:
        reason = (
            "the moving average is taken over whole weights, and stage 3 shards them"
            if stage == 3
            else "that is plain data parallelism"
        )
        raise ValueError(f"zero_stage must be 1 or 2, got {stage}: {reason}; {remedy}")
    offloaded = made.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        device = offloaded.get(name, {}).get("device", "none")
        if device != "none":
            raise ValueError(
                f"{name}_device must be none, got {device}: offloading is not tested; for less "
                "memory use zero2.yaml, fit.gradient_accumulation_steps or gradient checkpointing"
            )


def broadcast_object(value: Any) -> Any:
    """The main process's `value`, on every process."""
    if processes().world_size == 1:
        return value
    from accelerate.utils import broadcast_object_list

    accelerator()
    (received,) = broadcast_object_list([value], from_process=0)
    return received


def gather_objects(value: Any) -> list[Any]:
    """Every process's `value`, by rank, on every process."""
    if processes().world_size == 1:
        return [value]
    import torch

    found: list[Any] = [None] * processes().world_size
    torch.distributed.all_gather_object(found, value, group=control_group())
    return found


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """Raises on every rank if any rank failed, so that none blocks in a collective."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    said = gather_objects("" if problem is None else f"{problem or type(problem).__name__}")
    if problem is not None:
        raise problem
    for rank, sentence in enumerate(said):
        if sentence:
            raise RuntimeError(f"process {rank} failed: {sentence}")


@functools.cache
def control_group() -> Any:
    """A gloo process group for small messages, which do not synchronise the device."""
    import torch

    accelerator()
    return torch.distributed.new_group(backend="gloo", timeout=_timeout())


def wait_for_everyone() -> None:
    """Block until every process is here (a barrier)."""
    if processes().world_size > 1:
        accelerator().wait_for_everyone()


def leave_group() -> None:
    """Destroy the process group, if there is one, at the end of a successful program."""
    torch = sys.modules.get("torch")
    if (
        torch is not None
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        control_group.cache_clear()
        torch.distributed.destroy_process_group()
