"""What a device takes and what it can give: seconds and memory of a step, ceilings and floors.

The floor of the loss is its least work at the rates that the same device reaches elsewhere.
"""

import ctypes
import functools
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
FLUSHED_BYTES = 2**28  # more than the L2 cache of any GPU so far
EX2_A_CLOCK = 16  # of one multiprocessor, sm_70 to sm_90; CUDA C++ Programming Guide, throughput
# multiples of N^2 D floating point operations and of N^2 exponentials
Work = dict[Pass, tuple[float, float]]
SYMMETRIC: Work = {"forward": (1, 0.5), "backward": (3, 0.5)}  # every pair of pixels visited once
HYBRID: Work = {"forward": (1, 0.5), "backward": (4, 1)}  # backward, every row by its owner


@dataclass(frozen=True)
class Ceilings:
    """The rates that bound the loss, each per second."""

    is_cuda: bool
    flop: dict[str, float]  # of a large matrix product, by precision
    exponentials: float
    sources: str  # what was measured and what is stated, one line

    @property
    def form(self) -> str:
        """The work that the floor counts, in words."""
        if self.is_cuda:
            return "5 N^2 D FLOP, 1.5 N^2 exp, symmetric forward, row-owner backward, side by side"
        return "4 N^2 D FLOP, N^2 exp, symmetric, one after the other"

    def work_seconds(
        self, num_pixels: int, num_features: int, precision: str
    ) -> dict[Pass, tuple[float, float]]:
        """Seconds of the matrix products and of the exponentials, forward and backward."""
        pairs = num_pixels**2
        return {
            name: (
                products * pairs * num_features / self.flop[precision],
                exponentials * pairs / self.exponentials,
            )
            for name, (products, exponentials) in (HYBRID if self.is_cuda else SYMMETRIC).items()
        }

    def floor_seconds(
        self, num_pixels: int, num_features: int, precision: str
    ) -> dict[Pass, float]:
        """The least of each pass; a GPU takes exp while it multiplies, a CPU thread after."""
        combine = max if self.is_cuda else sum
        work = self.work_seconds(num_pixels, num_features, precision)
        floors: dict[Pass, float] = {name: float(combine(parts)) for name, parts in work.items()}
        return {**floors, "both": sum(floors.values())}


def measure_ceilings(device: torch.device, *, tiny: bool) -> Ceilings:
    """Time large matrix products (and exp on CPU, a copy on CUDA); `tiny` takes small ones."""
    if device.type == "cpu":
        flop = {"fp32": _matrix_product_flop(device, "fp32", 512 if tiny else 1024)}
        block, result = torch.rand(256, 1024), torch.empty(256, 1024)
        seconds = _fastest_seconds(device, lambda: torch.exp(block, out=result))
        rate = block.numel() / seconds
        sources = f"matrix product {flop['fp32'] / 1e9:.1f} GFLOP/s, exp {rate / 1e9:.2f} G/s"
        return Ceilings(False, flop, rate, sources)
    size = 2048 if tiny else 8192
    flop = {precision: _matrix_product_flop(device, precision, size) for precision in PRECISIONS}
    properties = torch.cuda.get_device_properties(device)
    clock = _max_clock_mhz(device) * 1e6
    rate = properties.multi_processor_count * EX2_A_CLOCK * clock
    source = torch.randint(2**31 - 1, (2**24 if tiny else 2**28,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _fastest_seconds(device, lambda: target.copy_(source))
    products = ", ".join(f"{name} {value / 1e12:.1f}" for name, value in flop.items())
    sources = (
        f"matrix product TFLOP/s: {products}; copy {copied / 1e9:.0f} GB/s read and written; "
        f"ex2 {rate / 1e12:.2f} T/s, not measured but stated: {properties.multi_processor_count} "
        f"multiprocessors x {EX2_A_CLOCK} x {clock / 1e6:.0f} MHz, the highest clock"
    )
    return Ceilings(True, flop, rate, sources)


def step_seconds(loss: Loss, z: Tensor, labels: Tensor) -> dict[Pass, float]:
    """Time one forward and its backward: CPU time of this process, or time on the CUDA device."""
    forward, backward = _lap_seconds(z.device, *_laps(loss, z, labels))
    return {"forward": forward, "backward": backward, "both": forward + backward}


def step_peaks_mb(loss: Loss, z: Tensor, labels: Tensor) -> dict[Pass, float]:
    """Highest memory during each pass of one step, above what was held before it, in MB.

    What the forward saves counts in the backward too. On CPU it is the resident memory, and nan
    where Linux's /proc is missing; what the process holds and reuses does not count.
    """
    laps = _laps(loss, z, labels)
    try:
        before = _start_of_peak_bytes(z.device)
        forward, backward = (_lap_peak_bytes(z.device, lap) - before for lap in laps)
    except (OSError, AttributeError):  # no /proc, or a libc without malloc_trim
        step_seconds(loss, z, labels)
        return dict.fromkeys(PASSES, math.nan)
    peaks = max(0, forward) / 2**20, max(0, backward) / 2**20
    return {"forward": peaks[0], "backward": peaks[1], "both": max(peaks)}


def call_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """CPU time that a call takes of this process, or its time on the CUDA device."""
    return _lap_seconds(device, call)[0]


def call_peak_mb(device: torch.device, call: Callable[[], object]) -> float:
    """Highest memory during a call, above what was held before it, in MB; as `step_peaks_mb`."""
    try:
        before = _start_of_peak_bytes(device)
        return max(0, _lap_peak_bytes(device, call) - before) / 2**20
    except (OSError, AttributeError):  # no /proc, or a libc without malloc_trim
        return math.nan


def free_bytes(device: torch.device) -> float:
    """Memory that a step may take on the device; without limit where nobody knows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return 1024 * _kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def device_name(device: torch.device) -> str:
    """The model, as the CSV names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, 1 thread ({model})"


def driver_version(device: torch.device) -> str:
    """Version of the NVIDIA driver; empty on CPU and where nvidia-smi does not answer."""
    return _ask_nvidia_smi("driver_version") if device.type == "cuda" else ""


def _laps(
    loss: Loss, z: Tensor, labels: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward without gradient from earlier steps, and the backward of what it returned."""
    z.grad = None
    values: list[Tensor] = []
    return lambda: values.append(loss(z, labels)), lambda: values.pop().backward()  # type: ignore[no-untyped-call]


def _lap_seconds(device: torch.device, *laps: Callable[[], object]) -> list[float]:
    """Seconds of each call, one after the other without a pause."""
    if device.type == "cpu":
        stamps = [time.process_time()]
        for lap in laps:
            lap()
            stamps.append(time.process_time())
        return [end - start for start, end in pairwise(stamps)]
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(len(laps) + 1)
    ]
    _flushed_buffer(device).add_(1)  # evicts the L2 cache, and the launches get a head start
    events[0].record()
    for lap, event in zip(laps, events[1:], strict=True):
        lap()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


@functools.cache
def _flushed_buffer(device: torch.device) -> Tensor:
    return torch.ones(FLUSHED_BYTES // 4, dtype=torch.int32, device=device)


def _matrix_product_flop(device: torch.device, precision: str, size: int) -> float:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    seconds = _fastest_seconds(device, lambda: torch.mm(left, right, out=result))
    torch.set_float32_matmul_precision(setting)
    return 2 * size**3 / seconds


def _fastest_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of one call, the best of ten series of five."""
    return min(sum(_lap_seconds(device, *[call] * 5)) / 5 for _ in range(10))


def _start_of_peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier steps left
    return 1024 * _kilobytes("/proc/self/status", "VmRSS")


def _lap_peak_bytes(device: torch.device, lap: Callable[[], object]) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        lap()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    lap()
    return 1024 * _kilobytes("/proc/self/status", "VmHWM")


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _max_clock_mhz(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device)
    answer = _ask_nvidia_smi("clocks.max.sm", f"--id=GPU-{properties.uuid}")
    return float(answer) if answer.isdecimal() else properties.clock_rate / 1000


def _ask_nvidia_smi(field: str, *words: str) -> str:
    """One property of the first device asked for, no unit; empty where there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *words]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()
