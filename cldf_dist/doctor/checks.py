"""The checks of `cldf doctor`: machines, GPUs, network, disks, data, tracking server.

Each check yields findings. Those with collectives run on every process.
"""

from __future__ import annotations

import logging
import os
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cldf_dist.config import FITTED, Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.doctor.measure import (
    ALL_REDUCE_BYTES,
    Seen,
    appears,
    bus_bandwidth,
    disk_pace,
    in_a_line,
    triton_fault,
    unet_xformers_fault,
    unused_path,
)
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.stages.cache import bytes_to_come
from cldf_dist.system.distributed import accelerator, broadcast_object, gather_objects, processes
from cldf_dist.system.locks import FolderLock

SLOW_NETWORK = 1e9  # bytes per second of the all-reduce, between GPUs
SMALL_SHARED_MEMORY = 1e9  # bytes
CLOCK_SKEW = 1.0  # seconds
FREE_FRACTION = 0.8  # of a GPU's memory, before anything of ours is on it
SLOW_DISK = 100e6  # bytes per second, written and synced
SLOW_FILES = 200.0  # small files per second


@dataclass(frozen=True)
class Finding:
    """One line: `level` is ok, warning or error; what is not ok says what to do."""

    level: str
    about: str
    said: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.about:<13} {self.said}"


def ok(about: str, said: str) -> Finding:
    """A finding that needs no action."""
    return Finding("ok", about, said)


def warning(about: str, said: str, remedy: str) -> Finding:
    """A finding that does not prevent a run."""
    return Finding("warning", about, f"{said}; {remedy}")


def error(about: str, said: str, remedy: str) -> Finding:
    """A finding that prevents a run."""
    return Finding("error", about, f"{said}; {remedy}")


def _measured(about: str, said: str, wrong: str, remedy: str) -> Finding:
    """A finding about a measurement: ok, or a warning where it is `wrong`, in words."""
    return warning(about, f"{said}, {wrong}", remedy) if wrong else ok(about, said)


def of_processes(everyone: Sequence[Seen]) -> Iterator[Finding]:
    """Findings about the ranks, their machines and their processors."""
    ranks = sorted(seen.rank for seen in everyone)
    if ranks != list(range(len(everyone))):
        remedy = "start them by accelerate launch or slurm/stage.sbatch"
        yield error("processes", f"the ranks are {ranks}, each must be there once", remedy)
        return
    counts = Counter(seen.host for seen in everyone)
    places = ", ".join(f"{host} x {count}" for host, count in counts.items())
    yield ok("processes", f"{len(everyone)} rank(s), each there once: {places}")
    if len(set(counts.values())) > 1:
        remedy = "the slowest decides: give each the same"
        yield warning("processes", "machines have different numbers of processes", remedy)
    for host, count in counts.items():
        processors = max(seen.processors for seen in everyone if seen.host == host)
        if count > processors:
            said = f"{host} has {count} processes on {processors} processor(s)"
            yield warning("processes", said, "ask for more with --cpus-per-task")


def of_versions(everyone: Sequence[Seen]) -> Iterator[Finding]:
    """Findings about the versions of Python and packages, which must agree on all machines."""
    first, differing = everyone[0], []
    for name in ("python", *first.packages):
        places = {(seen.packages | {"python": seen.python})[name]: seen.host for seen in everyone}
        if len(places) > 1:
            listed = ", ".join(f"{version} on {host}" for version, host in sorted(places.items()))
            differing.append(f"{name} {listed}")
    if differing:
        yield error("versions", "; ".join(differing), "use one environment on all nodes")
    else:
        names = ("torch", "accelerate", "deepspeed", "monai", "zarr")
        listed = ", ".join(f"{name} {first.packages[name]}" for name in names)
        yield ok("versions", f"Python {first.python}, {listed}, the same on all processes")
    for name, version in first.packages.items():
        if version == "not installed":
            yield warning("versions", f"{name} is not installed", f"pip install {name}")


def of_devices(everyone: Sequence[Seen]) -> Iterator[Finding]:
    """Findings about the GPUs: their kinds, assignment to ranks and free memory."""
    kinds = sorted({f"{seen.device} {seen.driver}".strip() for seen in everyone})
    if all(seen.device == "cpu" for seen in everyone):
        yield ok("devices", "no GPU: everything runs on CPUs, at a small part of the pace")
        return
    if any(seen.device == "cpu" for seen in everyone):
        remedy = "ask for --gpus-per-node on every node"
        yield error("devices", f"some processes have a GPU, others none: {kinds}", remedy)
        return
    if len(kinds) > 1:
        yield warning("devices", f"different GPUs or drivers: {kinds}", "the slowest decides")
    if len({(seen.host, seen.local_rank) for seen in everyone}) < len(everyone):
        remedy = "give each its own with --gpus-per-node and accelerate launch"
        yield error("devices", "two processes share a GPU", remedy)
    least = min(everyone, key=lambda seen: seen.device_free_bytes)
    free, total = least.device_free_bytes / 1e9, least.device_bytes / 1e9
    said = f"{least.device}, driver {least.driver}, {free:.1f} of {total:.1f} GB free"
    said += f" on {least.host}"
    wrong = "other programs hold the rest" if free < FREE_FRACTION * total else ""
    yield _measured("devices", said, wrong, "look at nvidia-smi")


def of_shared_memory(everyone: Sequence[Seen], config: Config) -> Iterator[Finding]:
    """Loader workers hand their batches over in /dev/shm."""
    least = min(everyone, key=lambda seen: seen.shared_memory_bytes)
    workers = max(getattr(config, section).fit.num_workers for section in FITTED)
    said = f"{least.shared_memory_bytes / 1e9:.1f} GB free in /dev/shm of {least.host}"
    is_small = workers and least.shared_memory_bytes < SMALL_SHARED_MEMORY
    wrong = f"which may be too little for fit.num_workers={workers}" if is_small else ""
    remedy = "enlarge it (containers: --shm-size), or take fewer workers"
    yield _measured("shared memory", said, wrong, remedy)


def of_clocks(everyone: Sequence[Seen]) -> Iterator[Finding]:
    """Findings about the clocks of the machines; none for one process."""
    if len(everyone) == 1:
        return
    clocks = [seen.clock for seen in everyone]
    skew = max(clocks) - min(clocks)
    if skew > CLOCK_SKEW:
        said = f"they differ by {skew:.1f} s: logs do not fit together, locks look stale"
        yield warning("clocks", said, "switch NTP on")
    else:
        yield ok("clocks", f"within {skew:.2f} s of each other")


def of_network() -> Iterator[Finding]:
    """An all-reduce over all processes, with its sum and its bandwidth."""
    if processes().world_size == 1:
        return
    device = accelerator().device
    values = torch.full((ALL_REDUCE_BYTES // 4,), float(processes().rank + 1), device=device)
    torch.distributed.all_reduce(values)  # the first one connects
    is_right = bool((values == sum(range(1, processes().world_size + 1))).all())
    rate = bus_bandwidth(values)
    backend = torch.distributed.get_backend()
    if not all(gather_objects(is_right)):
        remedy = "look at NCCL_DEBUG=INFO, try another NCCL_SOCKET_IFNAME"
        yield error("network", f"a sum over all processes by {backend} is wrong", remedy)
        return
    said = f"all-reduce of 64 MiB by {backend}: {rate / 1e9:.2f} GB/s bus bandwidth"
    wrong = "which is slow" if device.type == "cuda" and rate < SLOW_NETWORK else ""
    remedy = "is NCCL on the fast interface? NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
    yield _measured("network", said, wrong, remedy)


def of_kernels() -> Iterator[Finding]:
    """Triton, xformers and DeepSpeed: tried, not only looked for."""
    device = accelerator().device
    if device.type == "cuda":
        for name, fault, remedy in (
            ("triton", triton_fault(device), "decoder.contrast.backend=torch does without"),
            ("xformers", unet_xformers_fault(device), "diffusion.net.attention=sdpa does without"),
        ):
            said = "a trial on this device gives the right result"
            yield warning(name, fault, remedy) if fault else ok(name, said)
    else:
        yield ok("kernels", "Triton and xformers are for GPUs; CPUs do without")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed

        yield ok("deepspeed", f"{deepspeed.__version__} can be imported")
    except Exception as problem:  # it compiles and probes at import: whatever may fail
        remedy = "zero1.yaml and zero2.yaml need it, the others do not"
        yield warning("deepspeed", f"cannot be imported ({in_a_line(problem)})", remedy)


def of_slurm() -> Iterator[Finding]:
    """Findings about SLURM: the allocation, or whether there is one to be had."""
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        names = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK")
        nodes, tasks, processors = (os.environ.get(name, "?") for name in names)
        said = f"job {job}: {nodes} node(s), {tasks} task(s), {processors} processor(s) a task"
        yield ok("slurm", said)
    elif shutil.which("sbatch"):
        yield ok("slurm", "outside of an allocation; sbatch slurm/stage.sbatch doctor CONFIG")


def of_folder(config: Config) -> Iterator[Finding]:
    """The disk under `runs`, from every process: room, pace, locks, whether it is one folder."""
    folder = Path(config.runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pace, files = disk_pace(folder)
    except OSError as problem:
        said = f"cannot write {folder}: {problem.strerror}"
        yield error("disk", said, "choose another with runs=FOLDER")
        pace = files = 0.0
    paces = gather_objects((pace, files))
    if not all(written for written, _ in paces):
        return
    slowest, fewest = min(p for p, _ in paces), min(f for _, f in paces)
    free = shutil.disk_usage(folder).free / 1e9
    said = f"{folder}: {free:.1f} GB free, {slowest / 1e6:.0f} MB/s written and "
    said += f"{fewest:.0f} small files a second by each process"
    wrong = "which is slow" if slowest < SLOW_DISK or fewest < SLOW_FILES else ""
    yield _measured("disk", said, wrong, "put runs= on the scratch file system")
    yield from _one_folder(folder)
    if processes().is_main:
        yield from _lock(folder)


def _one_folder(folder: Path) -> Iterator[Finding]:
    """A finding: every process sees what the main one writes, or does not."""
    path = Path(broadcast_object(str(unused_path(folder))))
    if processes().is_main:
        path.write_text("here")
    broadcast_object(None)  # it is written
    sees = gather_objects(appears(path))
    if processes().is_main:
        path.unlink(missing_ok=True)
    blind = [rank for rank, can_see in enumerate(sees) if not can_see]
    if blind:
        said = f"processes {blind} do not see what process 0 writes to {folder}"
        yield error("disk", said, "runs= must lie on a file system that all nodes share")


def _lock(folder: Path) -> Iterator[Finding]:
    path = unused_path(folder)
    path.mkdir()
    try:
        lock = FolderLock(path)
        stands_in = (path / ".lock.exclusive").exists()
        lock.release()
    except (OSError, RuntimeError) as problem:
        yield error("locks", f"{folder}: {problem}", "choose a file system with flock by runs=")
    else:
        yield ok("locks", "a lock file stands in for flock" if stands_in else "flock works")
    finally:
        shutil.rmtree(path, ignore_errors=True)


def of_data(config: Config) -> Iterator[Finding]:
    """Shards against processes and workers; the cache against the disk."""
    folder = config.run_folder / "prepare"
    if not (folder / "manifest.json").exists():
        yield ok("data", "nothing is prepared yet; cldf prepare CONFIG")
        return
    try:
        shards = ShardSet(folder)
    except (ValueError, OSError) as problem:
        yield Finding("error", "data", str(problem))
        return
    table = shards.split("train")
    num_shards = len(set(table.shard_of.tolist()))
    readers = processes().world_size * max(config.diffusion.fit.num_workers, 1)
    said = f"{len(table)} training slices in {num_shards} shard(s), {readers} reader(s)"
    wrong = "so that several read the same shard" if num_shards < readers else ""
    remedy = "fewer fit.num_workers, or prepare again with a smaller data.slices_per_shard"
    yield _measured("data", said, wrong, remedy)
    needed, free = bytes_to_come(config, cached_slices(shards)), shutil.disk_usage(folder).free
    said = f"features take {needed / 1e9:.2f} GB more, {free / 1e9:.1f} GB are free"
    if needed > free:
        remedy = (
            "features.storage=int8, features.combine_timesteps=average, fewer features.taps, or "
            "runs=FOLDER on another disk"
        )
        yield error("cache", said, remedy)
    else:
        yield ok("cache", said)


def of_tracking(config: Config) -> Iterator[Finding]:
    """Findings about the MLflow store: whether it is reached."""
    uri = config.tracking.uri
    if not config.tracking.enabled:
        yield ok("mlflow", "switched off; metrics.jsonl holds everything")
    elif not uri.startswith(("http://", "https://")):
        place = uri or f"a file in {config.runs}"
        yield ok("mlflow", f"{place}; SLURM jobs leave it to cldf sync-tracking")
    else:
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
                yield ok("mlflow", f"{uri} answers ({answer.status})")
        except (OSError, ValueError) as problem:
            remedy = "metrics.jsonl holds everything; cldf sync-tracking sends it later"
            yield warning("mlflow", f"{uri} does not answer ({problem})", remedy)
