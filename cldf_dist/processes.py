"""Who we are among the processes of a launch: rank, world size, and a word passed around.

The launcher (accelerate, torchrun) tells through the environment; without one there is one process.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def processes() -> Processes:
    """This process's place in the launch, from the launcher's environment; imports no torch."""
    environment = os.environ
    return Processes(
        rank=int(environment.get("RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
    )


@functools.cache
def accelerator() -> Accelerator:
    """The one Accelerator of this process; it starts the process group.

    Raises RuntimeError where the launcher promised more processes than accelerate sees: they would
    train apart, each as rank 0 of 1 (accelerate's launcher does that on CPUs by default).
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU")
    group = InitProcessGroupKwargs(
        backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(hours=24),  # others may wait long for work of the main process alone
    )
    # mixed precision is fit()'s own autocast: a task may refuse it
    several = processes().world_size > 1
    result = Accelerator(mixed_precision="no", kwargs_handlers=[group] if several else [])
    expected, kind = processes().world_size, result.distributed_type.value
    if result.num_processes != expected or (several and kind == "NO"):
        raise RuntimeError(
            f"the launcher started {expected} processes, but accelerate would train each apart; "
            "on CPUs set ACCELERATE_USE_CPU=true and use configs/accelerate/cpu.yaml"
        )
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP"):
        raise RuntimeError(
            f"this version does not train with {kind}: its checkpoints hold whole, unsharded "
            "states; use configs/accelerate/ddp.yaml or multi_node.yaml"
        )
    return result


def from_main(value: Any) -> Any:
    """Main's `value` on every process."""
    if processes().world_size == 1:
        return value
    from accelerate.utils import broadcast_object_list

    accelerator()
    (received,) = broadcast_object_list([value], from_process=0)
    return received


def wait_for_everyone() -> None:
    if processes().world_size > 1:
        accelerator().wait_for_everyone()
