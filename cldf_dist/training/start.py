"""What a training starts from: a checkpoint of its own run, or the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import broadcast_object, fail_on_all_ranks, gather_objects
from cldf_dist.training.checkpoint import Checkpoint, newest_checkpoint, read_weights


def same_checkpoint(run: Run) -> Checkpoint | None:
    """The newest valid checkpoint; the main process looks, the others take its word."""
    with fail_on_all_ranks():
        found = newest_checkpoint(run.folder / "checkpoints", run.id) if run.is_main else None
    path = broadcast_object(found.path if found else None)
    if path is None:
        return None
    with fail_on_all_ranks():
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is not there for this process, but for the main one; the run folder must "
                "lie on a file system that all of them see"
            )
    return found or Checkpoint(path)


def same_items(fingerprint: str, found: Checkpoint | None) -> str:
    """What names the samples, the same on every process and at every start.

    Raises ValueError where it differs: the order of samples would be another one.
    """
    remedy = (
        "data.on_damaged=skip leaves out what is damaged: prepare the data again, or delete the "
        "copy in data.shard_cache where it is one"
    )
    if len(set(gather_objects(fingerprint))) > 1:
        raise ValueError(f"the processes would draw from other samples than each other; {remedy}")
    if found and found.state["items"] != fingerprint:
        raise ValueError(f"{found.path} was made from other samples than there are now; {remedy}")
    return fingerprint


def start_from(task: nn.Module, path: Path) -> None:
    """Load weights into `task.net`; ValueError where they do not fit."""
    net: Any = task.net
    try:
        net.load_state_dict(read_weights(path))
    except RuntimeError as error:  # torch lists every name that differs
        first = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"fit.start_from={path} does not fit this net: {first}") from error
