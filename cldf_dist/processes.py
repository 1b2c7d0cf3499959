"""Who we are among the processes of a launch: rank, world size, and a word passed around.

The launcher (accelerate, torchrun) tells through the environment; without one there is one process.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
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
    from accelerate import Accelerator

    # mixed precision is fit()'s own autocast: a task may refuse it
    result = Accelerator(mixed_precision="no")
    expected = processes().world_size
    if result.num_processes != expected:
        raise RuntimeError(
            f"accelerate sees {result.num_processes} process(es), the launcher started {expected}; "
            "on CPUs set ACCELERATE_USE_CPU=true and use configs/accelerate/cpu.yaml"
        )
    kind = result.distributed_type.value
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


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, by rank, on every process."""
    if processes().world_size == 1:
        return [value]
    from accelerate.utils import gather_object

    accelerator()
    return list(gather_object([value]))


def wait_for_everyone() -> None:
    if processes().world_size > 1:
        accelerator().wait_for_everyone()
