"""Diffusion features: activations of the frozen diffusion model's decoder.

One function serves the cache and the segmentation of new scans. The noise of a slice is a
function of its key, so that neither batches nor ranks change its features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cldf_dist.config import UNCONDITIONAL, Features
from cldf_dist.method.noise import Schedule, key_noise

CONDITIONS = {"no_object": 0, "object": 1, "none": UNCONDITIONAL}


class FeatureTaps:
    """Collects activations of a diffusion U-Net's up-blocks while in a `with` block.

    The name "up<level>.<resnet>" is `up_blocks[level]` (0 is the coarsest), after that resnet and,
    where the level has attention, after the attention behind it. A forward pass through `run`
    stops behind the last tap. Raises ValueError, with the valid names, for an unknown tap.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        modules = _tap_modules(net)
        unknown = [name for name in names if name not in modules]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(
                f"features.taps must name one or more different taps, got {list(names)}; "
                f"this network has {', '.join(modules)}"
            )
        self.net = net
        self.names = tuple(names)
        self._modules = {name: modules[name] for name in names}
        self._last = max(names, key=list(modules).index)
        self._kept: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> FeatureTaps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def run(self, noised: Tensor, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{tap: (batch, channels, h, w)} of one forward pass, in the order of `names`."""
        assert self._handles, "taps are collected inside `with FeatureTaps(...) as taps:`"
        with contextlib.suppress(_LastTapReached):
            self.net(noised, timesteps, class_labels=labels)
        kept, self._kept = self._kept, {}
        return {name: kept[name] for name in self.names}

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._kept[name] = output
            if name == self._last:
                raise _LastTapReached

        return keep


@torch.no_grad()
def extract_features(
    net: nn.Module, schedule: Schedule, images: Tensor, keys: Sequence[str], settings: Features
) -> dict[str, Tensor]:
    """{tap: (batch, levels, channels, h, w)} of images (batch, channels, height, width).

    `levels` are the noise levels in their order, averaged over draws; with `settings.contrast`
    then the same number of differences "object" - "no object". `net` is in evaluation mode.
    """
    if settings.condition not in CONDITIONS:
        raise ValueError(
            f"features.condition must be one of {', '.join(CONDITIONS)}, got {settings.condition!r}"
        )
    conditions = [settings.condition]
    if settings.contrast:
        conditions += [name for name in ("object", "no_object") if name != settings.condition]
    plain: dict[str, list[Tensor]] = {tap: [] for tap in settings.taps}
    contrast: dict[str, list[Tensor]] = {tap: [] for tap in settings.taps}
    with FeatureTaps(net, settings.taps) as taps:
        for level in settings.noise_levels:
            found = _at_noise_level(taps, schedule, images, keys, level, settings.draws, conditions)
            for tap, by_condition in found.items():
                plain[tap].append(by_condition[settings.condition])
                if settings.contrast:
                    contrast[tap].append(by_condition["object"] - by_condition["no_object"])
    return {tap: torch.stack(plain[tap] + contrast[tap], 1) for tap in settings.taps}


def tap_shapes(
    net: nn.Module, image_size: int, settings: Features
) -> dict[str, tuple[int, int, int, int]]:
    """{tap: (levels, channels, height, width)} that `extract_features` gives for square images."""
    FeatureTaps(net, settings.taps)  # refuses unknown names
    channels = list(reversed(net.block_out_channels))  # type: ignore[arg-type]
    num_levels = len(settings.noise_levels) * (2 if settings.contrast else 1)
    shapes = {}
    for tap in settings.taps:
        level = int(tap.removeprefix("up").split(".")[0])
        size = image_size // 2 ** (len(channels) - 1 - level)
        shapes[tap] = (num_levels, channels[level], size, size)
    return shapes


class _LastTapReached(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _tap_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Every tap by name, in the order of execution."""
    modules: dict[str, nn.Module] = {}
    for level, block in enumerate(net.up_blocks):  # type: ignore[arg-type]
        stages = getattr(block, "attentions", None) or block.resnets
        for index, module in enumerate(stages):
            modules[f"up{level}.{index}"] = module
    return modules


def _at_noise_level(
    taps: FeatureTaps,
    schedule: Schedule,
    images: Tensor,
    keys: Sequence[str],
    level: int,
    draws: int,
    conditions: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """{tap: {condition: (batch, channels, h, w)}}, all conditions from the same noised images."""
    num_images = len(images)
    device = images.device
    labels = torch.tensor([CONDITIONS[name] for name in conditions], device=device)
    labels = labels.repeat_interleave(num_images)
    timesteps = torch.full((num_images,), level, device=device)
    total: dict[str, Tensor] = {}
    for draw in range(draws):
        noise = key_noise(keys, level, draw, images.shape[1:], device)
        noised = schedule.add_noise(images, timesteps, noise).repeat(len(conditions), 1, 1, 1)
        found = taps.run(noised, timesteps.repeat(len(conditions)), labels)
        for tap, activation in found.items():
            total[tap] = total[tap] + activation if tap in total else activation
    return {
        tap: dict(zip(conditions, (activation / draws).chunk(len(conditions))))
        for tap, activation in total.items()
    }
