"""Trained nets as files: the weights in `net.safetensors`, their description in `net.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from cldf_dist.runs.run import read_json, write_atomically
from cldf_dist.training.checkpoint import write_tensors


def save_net(net: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Write the weights and the description, from which the net can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".net.safetensors.partial"
    try:
        write_tensors(net.state_dict(), temporary)
        temporary.replace(folder / "net.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(folder / "net.json", json.dumps(dict(description), indent=1))


def load_net(net: nn.Module, folder: Path) -> nn.Module:
    """`net` with the weights of `folder`, frozen and in evaluation mode.

    Raises FileNotFoundError where there are none.
    """
    path = folder / "net.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train the net first")
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def read_description(folder: Path) -> dict[str, Any]:
    """The description that `save_net` wrote."""
    return read_json(folder / "net.json")
