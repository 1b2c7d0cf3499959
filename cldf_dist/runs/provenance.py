"""Provenance of a result: commit, machine and versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def devices() -> list[str]:
    """The GPUs of this process, or its CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [cpu_name()]


def cpu_name() -> str:
    """The model as Linux tells it; elsewhere what Python knows."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it; empty where it is none."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return {"commit": "", "dirty": False}  # installed: the repository around is not ours

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except FileNotFoundError:
        return {"commit": "", "dirty": False}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("cldf-dist", "torch", "accelerate", "deepspeed", "monai", "zarr", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
