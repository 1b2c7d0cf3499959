"""The measurements and trials of `cldf doctor` on one process; `checks.py` judges them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from cldf_dist.config import UNet
from cldf_dist.nets.attention import xformers_fault
from cldf_dist.nets.unet import build_unet
from cldf_dist.system.distributed import accelerator, gather_objects, processes, wait_for_everyone

PACKAGES = (
    "cldf-dist", "torch", "accelerate", "deepspeed", "triton", "xformers", "monai", "zarr",
    "webdataset", "mlflow", "numpy",
)  # fmt: skip
ALL_REDUCE_BYTES = 64 * 2**20
TEST_FILE_BYTES = 64 * 2**20
SMALL_FILES = 200
SEEN_SECONDS = 10.0  # a network file system may take so long to show a file elsewhere


@dataclass(frozen=True)
class Seen:
    """The view that one process has of its machine."""

    rank: int
    local_rank: int
    host: str
    python: str
    packages: dict[str, str]
    device: str  # the GPU's name, or cpu
    device_bytes: int
    device_free_bytes: int
    driver: str
    shared_memory_bytes: int
    processors: int
    clock: float  # seconds, right after all processes met


def look_around() -> list[Seen]:
    """The views of all processes, by rank; on every process."""
    device = accelerator().device
    free, total, driver = 0, 0, ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        driver = _driver()
    wait_for_everyone()
    mine = Seen(
        rank=processes().rank,
        local_rank=processes().local_rank,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
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
    return gather_objects(mine)


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


def bus_bandwidth(values: torch.Tensor) -> float:
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
    sent = 2 * (processes().world_size - 1) / processes().world_size * ALL_REDUCE_BYTES
    return sent / min(seconds)


def unused_path(folder: Path) -> Path:
    """A name in the folder that no file has."""
    return folder / f".doctor-{uuid.uuid4().hex}"


def disk_pace(folder: Path) -> tuple[float, float]:
    """Bytes per second of one large file, synced, and small files made and removed per second."""
    path = unused_path(folder)
    block = os.urandom(2**20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(TEST_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        pace = TEST_FILE_BYTES / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(SMALL_FILES):
            path.write_bytes(b"")
            path.unlink()
        return pace, SMALL_FILES / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def appears(path: Path) -> bool:
    """True as soon as this process sees the file, False where it does not in time."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def triton_fault(device: torch.device) -> str:
    """The fault of the contrastive kernel on this device; "" where it is right."""
    from cldf_kernels import supcon_loss, supcon_reference

    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(256, 32, generator=generator), dim=1).to(device)
    labels = torch.arange(256, device=device) % 2
    try:
        found = supcon_loss(z, labels, temperature=0.1, backend="triton")
    except Exception as problem:  # compilers fail in their own ways
        return in_a_line(problem)
    expected = supcon_reference(z.double(), labels, temperature=0.1)
    return "" if torch.allclose(found.double(), expected, rtol=1e-2) else "gives a wrong loss"


def unet_xformers_fault(device: torch.device) -> str:
    """The fault of xformers' attention in the usual U-Net; "" where it is right."""
    with torch.device("meta"):
        net = build_unet(UNet(), 4)
    return in_a_line(xformers_fault(net, device, torch.bfloat16))


def in_a_line(problem: Exception | str) -> str:
    """The first 200 characters of a message; the error's name where it has none."""
    said = " ".join(str(problem).split())[:200]
    return said or (type(problem).__name__ if isinstance(problem, Exception) else "")
