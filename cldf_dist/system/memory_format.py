"""The memory format in which a net is fast."""

from __future__ import annotations

from typing import get_args

import torch

from cldf_dist.config import Layout

LAYOUTS = get_args(Layout)


def fast_memory_format(device: torch.device, wanted: str = "auto") -> torch.memory_format:
    """channels_last or contiguous, by `fit.channels_last` ("auto", "always", "never").

    On CPUs convolutions are faster in channels_last. On an H100 a bf16 step of the BraTS U-Net at
    256 x 256 took 398 ms in it and 304 ms in the contiguous format
    (`benchmarks/results/train.csv`), so "auto" is channels_last on CPUs alone. Raises ValueError
    for another word.
    """
    if wanted not in LAYOUTS:
        raise ValueError(f"channels_last must be one of {', '.join(LAYOUTS)}, got {wanted!r}")
    if wanted == "always" or (wanted == "auto" and device.type == "cpu"):
        return torch.channels_last
    return torch.contiguous_format
