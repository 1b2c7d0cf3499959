"""Batches on the device: on a GPU the next one is copied while this one is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


class DeviceBatches:
    """The batches of a loader, on `device`. Call `prefetch` once a step's work is launched.

    `waited` is the total time in seconds that was spent waiting for the loader.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        on_gpu = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._ahead: dict[str, Any] | None = None
        self.waited = 0.0

    def next(self) -> dict[str, Any]:
        """The next batch."""
        batch = self._ahead if self._ahead is not None else self._load()
        self._ahead = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)  # its memory is not reused before that is done
        return batch

    def prefetch(self) -> None:
        """Start copying the next batch to the GPU; a no-op on a CPU."""
        if self._stream is not None and self._ahead is None:
            self._ahead = self._load()

    def close(self) -> None:
        """End the loader's worker processes."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def _load(self) -> dict[str, Any]:
        started = time.monotonic()
        batch = next(self._batches)
        self.waited += time.monotonic() - started
        with torch.cuda.stream(self._stream):  # does nothing without one
            return to_device(batch, self._device)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, except the sample numbers."""
    return {
        key: value.to(device, non_blocking=True)
        # sample numbers seed generators: on the host they cost no synchronisation
        if isinstance(value, Tensor) and key != "sample_number"
        else value
        for key, value in batch.items()
    }
