"""The checks of `cldf doctor` on the machines: processes, versions, GPUs, memory, clocks, network.

Each check yields findings. Those with collectives run on every process.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence

import torch

from cldf_dist.config import FITTED, Config, UNet
from cldf_dist.doctor.findings import Finding, Seen, error, hosts, ok, warning
from cldf_dist.nets.attention import xformers_fault
from cldf_dist.nets.unet import build_unet
from cldf_dist.system.distributed import accelerator, gather_objects, processes

ALL_REDUCE_BYTES = 64 * 2**20
SLOW_NETWORK = 1e9  # bytes per second of the all-reduce, between GPUs
SMALL_SHARED_MEMORY = 1e9  # bytes
CLOCK_SKEW = 1.0  # seconds
FREE_SHARE = 0.8  # of a GPU's memory, before anything of ours is on it


def of_processes(everyone: Sequence[Seen]) -> Iterator[Finding]:
    """Findings about the ranks, their machines and their processors."""
    ranks = sorted(seen.rank for seen in everyone)
    counts = hosts(everyone)
    if ranks != list(range(len(everyone))):
        remedy = "start them by accelerate launch or slurm/stage.sbatch"
        yield error("processes", f"the ranks are {ranks}, each must be there once", remedy)
        return
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
    first = everyone[0]
    differing = []
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
    if free < FREE_SHARE * total:
        said += f" on {least.host}"
        yield warning("devices", said, "other programs hold the rest: look at nvidia-smi")
    else:
        yield ok("devices", said)


def of_shared_memory(everyone: Sequence[Seen], config: Config) -> Iterator[Finding]:
    """Loader workers hand their batches over in /dev/shm."""
    least = min(everyone, key=lambda seen: seen.shared_memory_bytes)
    workers = max(getattr(config, section).fit.num_workers for section in FITTED)
    said = f"{least.shared_memory_bytes / 1e9:.1f} GB free in /dev/shm of {least.host}"
    if workers and least.shared_memory_bytes < SMALL_SHARED_MEMORY:
        remedy = "enlarge it (containers: --shm-size), or take fewer workers"
        said += f", which may be too little for fit.num_workers={workers}"
        yield warning("shared memory", said, remedy)
    else:
        yield ok("shared memory", said)


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
    rate = _bus_bandwidth(values)
    backend = torch.distributed.get_backend()
    if not all(gather_objects(is_right)):
        remedy = "look at NCCL_DEBUG=INFO, try another NCCL_SOCKET_IFNAME"
        yield error("network", f"a sum over all processes by {backend} is wrong", remedy)
        return
    said = f"all-reduce of 64 MiB by {backend}: {rate / 1e9:.2f} GB/s bus bandwidth"
    if device.type == "cuda" and rate < SLOW_NETWORK:
        remedy = "is NCCL on the fast interface? NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
        yield warning("network", f"{said}, which is slow", remedy)
    else:
        yield ok("network", said)


def _bus_bandwidth(values: torch.Tensor) -> float:
    """Bytes per second that each process sends and receives, as nccl-tests count them."""

    def wait() -> None:
        if values.is_cuda:
            torch.cuda.synchronize(values.device)

    seconds = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        torch.distributed.all_reduce(values)
        wait()
        seconds.append(time.perf_counter() - started)
    share = 2 * (processes().world_size - 1) / processes().world_size
    return share * ALL_REDUCE_BYTES / min(seconds)


def of_kernels() -> Iterator[Finding]:
    """Triton, xformers and DeepSpeed: tried, not only looked for."""
    device = accelerator().device
    if device.type == "cuda":
        triton, xformers = _triton_fault(device), _xformers_fault(device)
        yield _tried("triton", triton, "decoder.contrast.backend=torch does without")
        yield _tried("xformers", xformers, "diffusion.net.attention=sdpa does without")
    else:
        yield ok("kernels", "Triton and xformers are for GPUs; CPUs do without")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed

        yield ok("deepspeed", f"{deepspeed.__version__} can be imported")
    except Exception as problem:  # it compiles and probes at import: whatever may fail
        remedy = "zero1.yaml and zero2.yaml need it, the others do not"
        yield warning("deepspeed", f"cannot be imported ({_in_a_line(problem)})", remedy)


def _tried(name: str, fault: str, remedy: str) -> Finding:
    if fault:
        return warning(name, fault, remedy)
    return ok(name, "a trial on this device gives the right result")


def _triton_fault(device: torch.device) -> str:
    from cldf_kernels import supcon_loss, supcon_reference

    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(256, 32, generator=generator), dim=1).to(device)
    labels = torch.arange(256, device=device) % 2
    try:
        found = supcon_loss(z, labels, temperature=0.1, backend="triton")
    except Exception as problem:  # compilers fail in their own ways
        return _in_a_line(problem)
    expected = supcon_reference(z.double(), labels, temperature=0.1)
    return "" if torch.allclose(found.double(), expected, rtol=1e-2) else "gives a wrong loss"


def _xformers_fault(device: torch.device) -> str:
    with torch.device("meta"):
        net = build_unet(UNet(), 4)
    return " ".join(xformers_fault(net, device, torch.bfloat16).split())[:200]


def _in_a_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


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
