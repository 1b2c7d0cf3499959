"""The start of a training: from a checkpoint of its own run, or from the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import broadcast_object, fail_on_all_ranks, gather_objects
from cldf_dist.training.checkpoint import Checkpoint, newest_checkpoint, read_weights


def same_checkpoint(run: Run) -> Checkpoint | None:
    """The newest valid checkpoint, chosen by the main process for all of them.

    Raises FileNotFoundError where another process does not see it.
    """
    with fail_on_all_ranks():
        found = newest_checkpoint(run.folder / "checkpoints", run.id) if run.is_main else None
    path = broadcast_object(found.path if found else None)
    if path is None:
        return None
    with fail_on_all_ranks():
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is visible to the main process, but not to this one; the run folder must "
                "lie on a file system that all processes share"
            )
    return found or Checkpoint(path)


def same_items(fingerprint: str, found: Checkpoint | None) -> str:
    """The fingerprint of the samples.

    Raises ValueError where it differs between processes or from the checkpoint: the order of
    samples would differ.
    """
    remedy = (
        "data.on_damaged=skip leaves out what is damaged: prepare the data again, or delete the "
        "copy in data.shard_cache where it is one"
    )
    if len(set(gather_objects(fingerprint))) > 1:
        raise ValueError(f"the processes have different samples; {remedy}")
    if found and found.state["items"] != fingerprint:
        raise ValueError(f"{found.path} was trained on other samples than there are now; {remedy}")
    return fingerprint


def start_from(task: nn.Module, path: Path) -> None:
    """Load weights into `task.net`; raises ValueError where they do not fit."""
    net: Any = task.net
    try:
        net.load_state_dict(read_weights(path))
    except RuntimeError as error:  # torch lists every name that differs
        first = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"fit.start_from={path} does not fit this net: {first}") from error
