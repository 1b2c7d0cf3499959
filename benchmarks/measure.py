"""Clocks, peak memory and ceilings of a device.

Contestants are measured in turns (`alternate`), so that all meet the same load of the machine.
"""

import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

FLUSHED_BYTES = 2**28  # more than the L2 cache of any GPU so far
CPU = torch.device("cpu")
Call = Callable[[], object]
Result = TypeVar("Result")


def alternate(
    calls: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 0
) -> dict[str, list[Result]]:
    """What each call returns, in turns, so that all meet the same load of the machine.

    The first `warmup` rounds are not kept.
    """
    found: dict[str, list[Result]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            result = call()
            if number >= warmup:
                found[name].append(result)
    return found


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def cpu_and_wall(call: Call) -> tuple[float, float]:
    """Seconds of a call: processor time of this process (user and system), and the wall's."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def seconds_of(device: torch.device, *calls: Call) -> list[float]:
    """Of each call, one after the other without a pause: CPU time, or time on the CUDA device.

    On CUDA the L2 cache is flushed before the first.
    """
    if device.type == "cpu":
        stamps = [time.process_time()]
        for call in calls:
            call()
            stamps.append(time.process_time())
        return [end - start for start, end in pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]  # type: ignore[no-untyped-call]
    _flushed_buffer(device).add_(1)  # and the launches get a head start
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def fastest_seconds(device: torch.device, call: Call) -> float:
    """Of one call: the best of ten series of five."""
    return min(sum(seconds_of(device, *[call] * 5)) / 5 for _ in range(10))


def matrix_product_flop(device: torch.device, precision: str, *, tiny: bool) -> float:
    """FLOPs per second of a large product in fp16, bf16, tf32 or fp32: a ceiling of the device."""
    size = (512 if tiny else 1024) if device.type == "cpu" else (2048 if tiny else 8192)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    seconds = fastest_seconds(device, lambda: torch.mm(left, right, out=result))
    torch.set_float32_matmul_precision(setting)
    return 2 * size**3 / seconds


def reset_peak(device: torch.device) -> None:
    """Free what nobody holds, and forget how much was held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError):
        _forget_peak(device)


def peak_bytes(device: torch.device) -> float:
    """The most that was held since `reset_peak`: allocated on the GPU, or resident on the host,
    all of the process; nan where Linux's /proc is missing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _proc_bytes("/proc/self/status", "VmHWM")


def peaks_mb(device: torch.device, *calls: Call) -> list[float]:
    """The highest memory during each call, above what was held before the first, in MB.

    What the process holds and reuses does not count. On CPU nan where /proc is missing.
    """
    peaks = []
    try:
        if device.type == "cuda":
            before = float(torch.cuda.memory_allocated(device))
        else:
            ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls left
            before = _proc_bytes("/proc/self/status", "VmRSS")
        for call in calls:
            _forget_peak(device)
            call()
            peaks.append(max(0.0, peak_bytes(device) - before) / 2**20)
    except (OSError, AttributeError):  # no /proc, or a libc without malloc_trim
        return [math.nan] * len(calls)
    return peaks


def free_bytes(device: torch.device) -> float:
    """Memory that may be taken on the device; without limit where nobody knows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    free = _proc_bytes("/proc/meminfo", "MemAvailable")
    return math.inf if math.isnan(free) else free


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files in the folders."""
    files = (path for folder in folders for path in folder.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark


@functools.cache
def _flushed_buffer(device: torch.device) -> Tensor:
    return torch.ones(FLUSHED_BYTES // 4, dtype=torch.int32, device=device)


def _proc_bytes(path: str, field: str) -> float:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return math.nan
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))
