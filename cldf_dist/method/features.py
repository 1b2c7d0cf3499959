"""Diffusion features: activations of the frozen diffusion model's decoder.

The cache and the segmentation of new scans use the same function. The noise of a slice is a
function of its key, so that neither batches nor ranks change its features.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.config import Features
from cldf_dist.labels import UNCONDITIONAL
from cldf_dist.method.noise import Schedule, key_noise

CONDITIONS = {"no_object": 0, "object": 1, "none": UNCONDITIONAL}
IMAGE_TAP = re.compile(r"image([13579])")
CLASSIFIER_TAP = re.compile(r"cam([1234])")  # of the clean classifier's layers, finest first


class FeatureTaps:
    """A context manager that collects activations of a diffusion U-Net's up-blocks.

    The name "up<level>.<resnet>" is the output of that resnet of `up_blocks[level]` (0 is the
    coarsest) or, where the level has attention, of the attention block after it. A forward pass
    through `run` stops after the last tap. Raises ValueError, with the valid names, for an unknown
    tap.
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

    def run(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, "batch _channels _height _width"]]:
        """The activations of one forward pass by tap, in the order of `names`."""
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
    net: nn.Module,
    schedule: Schedule,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    settings: Features,
    dtype: torch.dtype | None = None,
    classifier: nn.Module | None = None,
) -> dict[str, Float32[Tensor, "batch _levels _channels _height _width"]]:
    """The features of slices by tap; each tap has its own levels, channels and resolution.

    The levels are the maps that `num_levels` counts: the timesteps in their order (or their mean),
    each with its noise samples if those are stacked; with `settings.contrast` then the same number
    of differences "object" - "no object". A tap "image<size>" is the slice itself, as one level:
    the square of that many pixels around each pixel. A tap "cam<layer>" is the output of that layer
    of the clean `classifier`, as one level. `net` is in evaluation mode; `dtype` is that of its
    autocast. Raises ValueError for an unknown condition or tap.
    """
    if settings.condition not in CONDITIONS:
        raise ValueError(
            f"features.condition must be one of {', '.join(CONDITIONS)}, got {settings.condition!r}"
        )
    own = {tap: image_patches(images, size) for tap in settings.taps if (size := patch_size(tap))}
    if layers := {tap: f"layer{found[1]}" for tap in settings.taps if (found := _layer(tap))}:
        own |= classifier_features(classifier, images, layers)
    of_net = tuple(tap for tap in settings.taps if tap not in own)
    if of_net or not own:
        own |= _of_net(net, schedule, images, keys, replace(settings, taps=of_net), dtype)
    return {tap: own[tap] for tap in settings.taps}


def image_patches(
    images: Float[Tensor, "batch channels height width"], size: int
) -> Float32[Tensor, "batch 1 features height width"]:
    """The square of `size` pixels (odd) around each pixel, with the border replicated.

    There are channels * size * size features.
    """
    padded = functional.pad(images.float(), (size // 2,) * 4, mode="replicate")
    patches: Tensor = functional.unfold(padded, size)
    return patches.view(len(images), 1, -1, *images.shape[2:])


def classifier_features(
    classifier: nn.Module | None,
    images: Float[Tensor, "batch channels height width"],
    layers: dict[str, str],
) -> dict[str, Float32[Tensor, "batch 1 _channels _height _width"]]:
    """The outputs of the classifier's submodules by tap; `layers` names the submodule of each tap.

    Raises ValueError without a classifier.
    """
    if classifier is None:
        raise ValueError(f"the taps {', '.join(layers)} need the classifier of clean slices")
    kept: dict[str, Tensor] = {}
    handles = []
    for tap, name in layers.items():

        def keep(_module: nn.Module, _inputs: object, output: Tensor, tap: str = tap) -> None:
            kept[tap] = output.float()[:, None]

        handles.append(classifier.get_submodule(name).register_forward_hook(keep))
    try:
        classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def patch_size(tap: str) -> int:
    """The side in pixels of the patch of an image tap, such as 3 for "image3"; 0 for other taps."""
    found = IMAGE_TAP.fullmatch(tap)
    return int(found[1]) if found else 0


def _layer(tap: str) -> re.Match[str] | None:
    return CLASSIFIER_TAP.fullmatch(tap)


def _of_net(
    net: nn.Module,
    schedule: Schedule,
    images: Tensor,
    keys: Sequence[str],
    settings: Features,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The features of `extract_features`, where all taps are of the diffusion network."""
    conditions = [settings.condition]
    if settings.contrast:
        conditions += [name for name in ("object", "no_object") if name != settings.condition]
    plain = {tap: _Combined(settings) for tap in settings.taps}
    contrast = {tap: _Combined(settings) for tap in settings.taps}
    precision = torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=bool(dtype))
    with FeatureTaps(net, settings.taps) as taps, precision:
        for level, draw in itertools.product(
            range(len(settings.timesteps)), range(settings.num_noise_samples)
        ):
            timestep = settings.timesteps[level]
            which = draw if settings.noise == "drawn" else None
            found = _one_pass(taps, schedule, images, keys, timestep, which, conditions)
            for tap, by_condition in found.items():
                plain[tap].add(level, draw, by_condition[settings.condition])
                if settings.contrast:
                    difference = by_condition["object"] - by_condition["no_object"]
                    contrast[tap].add(level, draw, difference)
    return {tap: torch.stack(plain[tap].maps() + contrast[tap].maps(), 1) for tap in settings.taps}


def features_dtype(settings: Features, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `features.precision` on a device: bfloat16, or None for float32."""
    on_gpu = device.type == "cuda"
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and on_gpu)
    return torch.bfloat16 if bf16 else None


def num_levels(settings: Features) -> int:
    """The number of maps that are kept of each channel of a tap."""
    levels = len(settings.timesteps) if settings.combine_timesteps == "stack" else 1
    num_noise_samples = (
        settings.num_noise_samples if settings.combine_noise_samples == "stack" else 1
    )
    return levels * num_noise_samples * (2 if settings.contrast else 1)


def tap_shapes(
    net: nn.Module, image_size: int, settings: Features, classifier_channels: Sequence[int]
) -> dict[str, tuple[int, int, int, int]]:
    """The (levels, channels, height, width) of each tap of `extract_features` for square images.

    `classifier_channels` are those of the clean classifier's layers, each of which halves the
    resolution of the one before. Raises ValueError for an unknown tap.
    """
    of_net = [tap for tap in settings.taps if not (patch_size(tap) or _layer(tap))]
    if of_net or not settings.taps:
        FeatureTaps(net, of_net)  # refuses unknown names
    channels = list(reversed(net.block_out_channels))  # type: ignore[arg-type]
    shapes = {}
    for tap in settings.taps:
        if across := patch_size(tap):
            num_values = int(net.in_channels) * across**2  # type: ignore[arg-type]
            shapes[tap] = (1, num_values, image_size, image_size)
            continue
        if layer := _layer(tap):
            index = int(layer[1]) - 1
            size = -(-image_size // 2**index)
            shapes[tap] = (1, classifier_channels[index], size, size)
            continue
        level = int(tap.removeprefix("up").split(".")[0])
        size = image_size // 2 ** (len(channels) - 1 - level)
        shapes[tap] = (num_levels(settings), channels[level], size, size)
    return shapes


class _Combined:
    """Maps of one tap, averaged or stacked over timesteps and noise samples by the settings."""

    def __init__(self, settings: Features) -> None:
        self._stacks_levels = settings.combine_timesteps == "stack"
        self._stacks_noise_samples = settings.combine_noise_samples == "stack"
        self._draws = settings.num_noise_samples if self._stacks_noise_samples else 1
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, level: int, draw: int, activation: Tensor) -> None:
        """Add the map of timestep number `level` and noise sample number `draw`."""
        place = self._draws * (level if self._stacks_levels else 0)
        place += draw if self._stacks_noise_samples else 0
        so_far = self._sums.get(place)
        self._sums[place] = activation if so_far is None else so_far + activation
        self._counts[place] = self._counts.get(place, 0) + 1

    def maps(self) -> list[Tensor]:
        return [self._sums[place] / self._counts[place] for place in sorted(self._sums)]


class _LastTapReached(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _tap_modules(net: nn.Module) -> dict[str, nn.Module]:
    """The module of each tap by name, in the order of execution."""
    modules: dict[str, nn.Module] = {}
    for level, block in enumerate(net.up_blocks):  # type: ignore[arg-type]
        stages = getattr(block, "attentions", None) or block.resnets
        for index, module in enumerate(stages):
            modules[f"up{level}.{index}"] = module
    return modules


def _one_pass(
    taps: FeatureTaps,
    schedule: Schedule,
    images: Tensor,
    keys: Sequence[str],
    level: int,
    draw: int | None,
    conditions: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """float32 (batch, channels, height, width) by tap and condition, from the same noised images.

    Without a `draw` the images get no noise: they are the mean over all noise samples.
    """
    num_images, device = len(images), images.device
    labels = torch.tensor([CONDITIONS[name] for name in conditions], device=device)
    labels = labels.repeat_interleave(num_images)
    timesteps = torch.full((num_images,), level, device=device)
    if draw is None:
        noise = torch.zeros_like(images)
    else:
        noise = key_noise(keys, level, draw, images.shape[1:], device)
    noised = schedule.add_noise(images, timesteps, noise).repeat(len(conditions), 1, 1, 1)
    found = taps.run(noised, timesteps.repeat(len(conditions)), labels)
    return {
        tap: dict(zip(conditions, activation.float().chunk(len(conditions))))
        for tap, activation in found.items()
    }
