"""Properties of a device that decide how kernels are launched on it."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

INTERPRETED_ARCHITECTURE = 90


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the compute capability times ten; `INTERPRETED_ARCHITECTURE` for a CPU."""
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
