"""The throughput of a training: slices per second, data wait, memory, FLOPs utilisation."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Dense peak in TFLOP/s by (a word of the device's name, 16-bit; float32 as TF32), from the data
# sheets of the makers; the longer name first
PEAKS = (
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 418.0),
    ("H100", 989.0, 495.0),
    ("H200", 989.0, 495.0),
    ("GH200", 989.0, 495.0),
    ("B200", 2250.0, 1125.0),
    ("A100", 312.0, 156.0),
    ("A40", 149.7, 74.8),
    ("A30", 165.0, 82.0),
    ("A10", 125.0, 62.5),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("V100", 125.0, 15.7),
)
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Throughput:
    """A timer from one log line to the next, without validation, previews and saving."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None, world_size: int) -> None:
        self._device = device
        self._peak = peak_tflops(device, dtype) * world_size
        self._tflop_per_slice = 0.0
        self.is_counted = False
        self._waited = self._paused = 0.0
        self._since, self._step = time.monotonic(), 0

    def count(self, net: nn.Module, batch: Mapping[str, Any], num_slices: int) -> None:
        """Count the model's FLOPs a slice: one forward pass, and twice as much for the backward."""
        uncounted = {ATTENTION_ON_CPU: _attention_flop}  # by torch 2.13
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
            net(batch)
        self.is_counted = True
        self._tflop_per_slice = 3 * counter.get_total_flops() / num_slices / 1e12

    def start(self, step: int, waited: float = 0.0) -> None:
        """Start the timer at `step`; `waited` is the loader's total waiting time in seconds."""
        self._since, self._step = time.monotonic(), step
        self._waited, self._paused = waited, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context of work that is not counted as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def metrics(self, step: int, batch_size: int, waited: float) -> dict[str, float]:
        """The metrics since `start`, by name; restarts the timer.

        Over all processes, except data wait and memory, which are this process's.
        """
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        slices_per_second = (step - self._step) * batch_size / seconds
        tflops = slices_per_second * self._tflop_per_slice
        result = {
            "speed/slices_per_second": slices_per_second,
            "speed/data_wait_fraction": (waited - self._waited) / seconds,
            "speed/memory_gb": memory_gb(self._device),
            "speed/model_tflops": tflops,
        }
        if self._peak:
            result["speed/model_flops_utilisation"] = tflops / self._peak
        self.start(step, waited)
        return result


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: on the device, or of the host without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_tflops(device: torch.device, dtype: torch.dtype | None) -> float:
    """The device's peak TFLOP/s for dense matrix products of `dtype`; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    for word, half, single in PEAKS:
        if re.search(rf"\b{word}\b", name):
            return single if dtype is None else half
    return 0.0


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of an attention, from the shapes of its arguments."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
