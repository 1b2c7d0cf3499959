"""Ask everything and print it, as it is known.

On one process, or on all of a launch: every process tells what it sees, and the main one compares.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cldf_dist.config import Config
from cldf_dist.doctor import folders, machines
from cldf_dist.doctor.findings import Finding, Seen
from cldf_dist.system.distributed import (
    TIMEOUT,
    accelerator,
    gather_objects,
    processes,
    wait_for_everyone,
)

PACKAGES = (
    "cldf-dist", "torch", "accelerate", "deepspeed", "triton", "xformers", "monai", "zarr",
    "webdataset", "mlflow", "numpy",
)  # fmt: skip
PATIENCE_SECONDS = "120"


def run(config: Config) -> int:
    """Print every finding as soon as it is known; 1 where there is an error, else 0."""
    os.environ.setdefault(
        TIMEOUT, PATIENCE_SECONDS
    )  # a network that hangs is a finding, not a wait
    _say(f"cldf doctor: {processes().world_size} process(es), run folder {config.run_folder}")
    errors = 0
    for finding in _findings(config):
        _say(str(finding))
        errors += finding.level == "error"
    if processes().is_main:
        _say(f"{errors} error(s)" if errors else "nothing stands in the way")
    return int(any(gather_objects(errors)))


def _findings(config: Config) -> Iterator[Finding]:
    try:
        accelerator()
    except (RuntimeError, ValueError) as problem:
        yield Finding("error", "processes", str(problem))
        return
    everyone = _look_around()
    yield from machines.of_processes(everyone)
    yield from machines.of_versions(everyone)
    yield from machines.of_devices(everyone)
    yield from machines.of_shared_memory(everyone, config)
    yield from machines.of_clocks(everyone)
    yield from machines.of_network()
    yield from machines.of_kernels()
    yield from machines.of_slurm()
    yield from folders.of_folder(config)
    if processes().is_main:
        yield from folders.of_data(config)
        yield from folders.of_tracking(config)


def _look_around() -> list[Seen]:
    import torch

    device = accelerator().device
    free, total, driver = 0, 0, ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        driver = _driver()
    wait_for_everyone()
    seen = Seen(
        rank=processes().rank,
        local_rank=processes().local_rank,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        process=os.getpid(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        device_bytes=total,
        device_free_bytes=free,
        driver=driver,
        shared_memory_bytes=_free_bytes("/dev/shm"),
        processors=len(os.sched_getaffinity(0)),
        clock=time.time(),
    )
    return [Seen(**found) for found in gather_objects(asdict(seen))]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _free_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _say(text: str) -> None:
    if processes().is_main:
        print(text, flush=True)
    elif text.startswith("error"):
        print(f"process {processes().rank}: {text}", file=sys.stderr, flush=True)
