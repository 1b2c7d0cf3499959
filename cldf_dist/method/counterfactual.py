"""Counterfactual baselines: the diffusion model predicts the slice without the object.

All maps are >= 0 and on one scale for all slices, so that one threshold serves all of them.
docs/method.md, "Baselines", says what is published, what the published code does, and where this
differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from cldf_dist.labels import UNCONDITIONAL, SliceLabel
from cldf_dist.method.gradient_map import smooth
from cldf_dist.method.noise import Schedule, key_noise

EMBEDDING = "class_embedding.weight"  # (labels, channels) of MONAI's U-Net

# (x_t, timesteps, labels) -> the diffusion model's output
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
Classifier = Callable[[Tensor, Tensor], Tensor]  # (x_t, timesteps) -> logits


@torch.no_grad()
def cdm_saliency(
    net: nn.Module,
    schedule: Schedule,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    *,
    timesteps: Sequence[int],
    num_noise_samples: int,
    smooth_pixels: float,
) -> Float[Tensor, "batch height width"]:
    """Saliency >= 0 by condition flip, on one scale for all slices.

    The mean over timesteps and noise samples of |noise predicted for "object" - noise predicted for
    "no object"| at the same x_t, summed over channels, then smoothed.
    """
    num_images = len(images)
    labels = torch.arange(2, device=images.device).repeat_interleave(num_images)
    total = torch.zeros_like(images[:, 0])
    for timestep in timesteps:
        steps = torch.full((2 * num_images,), timestep, device=images.device)
        for sample in range(num_noise_samples):
            noise = key_noise(keys, timestep, sample, images.shape[1:], images.device)
            noised = schedule.add_noise(images, steps[:num_images], noise).repeat(2, 1, 1, 1)
            output = net(noised, steps, class_labels=labels)
            absent, present = schedule.predicted_noise(noised, steps, output).chunk(2)
            total += (present - absent).abs().sum(1)
    return smooth(total / (len(timesteps) * num_noise_samples), smooth_pixels)


@torch.no_grad()
def cg_diff(
    net: nn.Module,
    classifier: Classifier,
    schedule: Schedule,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    *,
    timestep: int,
    steps: int,
    scale: float,
    inversion: bool,
    smooth_pixels: float,
    label_scale: float = 1.0,
) -> Float[Tensor, "batch height width"]:
    """Saliency >= 0: |the slice - its object-free counterfactual|.

    The counterfactual takes `steps` deterministic DDIM steps from `timestep` down to timestep 0,
    with the label "no object" and the classifier's gradient towards it, times `scale`. The
    difference is summed over channels, then smoothed. With a `label_scale` other than 1 the steps
    down use classifier-free guidance of that scale (Ho and Salimans 2021).

    `inversion` (Wolleb et al. 2022): the slice is encoded by the same steps upwards, without a
    label, and the counterfactual is compared with the slice itself. Else, as in the code of Hu et
    al. 2023: noise is added to the slice, and the counterfactual is compared with a second branch
    from the same noise, which is denoised and guided towards "object".
    """
    sampler = _Guided(_guided_by_label(net, label_scale), classifier, schedule, scale)
    down = _path(timestep, steps)
    if inversion:
        noised = images
        unlabelled, encoder = (
            _classes(images, UNCONDITIONAL),
            replace(sampler, denoise=_labelled(net)),
        )
        for upper, lower in reversed(down):
            noised = encoder.step(noised, lower, upper, unlabelled)
        targets = _classes(images, SliceLabel.NEGATIVE)
    else:
        noised = _noised(schedule, images, keys, timestep).repeat(2, 1, 1, 1)
        targets = _classes(images, SliceLabel.POSITIVE, SliceLabel.NEGATIVE)
    for upper, lower in down:
        noised = sampler.step(noised, upper, lower, targets, targets)
    present, absent = (images, noised) if inversion else noised.chunk(2)
    return smooth((present - absent).abs().sum(1), smooth_pixels)


@torch.no_grad()
def cg_cdm(
    net: nn.Module,
    classifier: Classifier,
    schedule: Schedule,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    *,
    timestep: int,
    steps: int,
    scale: float,
    tau: float,
    smooth_pixels: float,
) -> Float[Tensor, "batch height width"]:
    """Saliency >= 0: |the derivative of the denoised slice with respect to its label|.

    Hu et al. 2023, Algorithm 1: two branches start from the same noised slice, one with the label
    embedding f(object), one with `tau` f(object) + (1 - tau) f(no object). They take `steps`
    adjacent DDIM steps from `timestep` down. After each step their difference, divided by 1 - tau,
    is added to the sum. Each branch is guided towards its own class by the classifier's gradient
    times `scale`; with scale 0 it is their CDM. The absolute value is summed over channels, then
    smoothed.

    `net` embeds its labels by `class_embedding`, as MONAI's U-Net does.
    """
    denoise, between = _with_label_between(net, tau)
    sampler = _Guided(denoise, classifier, schedule, scale)
    noised = _noised(schedule, images, keys, timestep).repeat(2, 1, 1, 1)
    labels = _classes(images, SliceLabel.POSITIVE, between)
    targets = _classes(images, SliceLabel.POSITIVE, SliceLabel.NEGATIVE)
    total = torch.zeros_like(images)
    for level in range(timestep, timestep - steps, -1):
        noised = sampler.step(noised, level, level - 1, labels, targets)
        present, absent = noised.chunk(2)
        total += (present - absent) / (1 - tau)
    return smooth(total.abs().sum(1), smooth_pixels)


@dataclass(frozen=True)
class _Guided:
    """Deterministic DDIM steps of a diffusion model under a classifier's guidance."""

    denoise: Denoiser
    classifier: Classifier
    schedule: Schedule
    scale: float

    def step(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timestep: int,
        next_timestep: int,
        labels: Int[Tensor, " batch"],
        targets: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """x_next of x_t, conditioned on `labels` and guided towards the classes `targets`.

        Guidance subtracts sqrt(1 - a_t) scale grad log p(target | x_t) from the predicted noise
        (Dhariwal and Nichol 2021, Algorithm 2), after the predicted clean image was clipped.
        """
        times = torch.full((len(noised),), timestep, device=noised.device)
        output = self.denoise(noised, times, labels)
        stepped = self.schedule.ddim_step(noised, timestep, next_timestep, output)
        if targets is None or self.scale == 0:
            return stepped
        ends = times.new_tensor([timestep, next_timestep])
        signal, next_signal = self.schedule.signal(ends).unbind()
        # x_next = sqrt(a_next / a_t) x_t + by_noise * predicted noise
        by_noise = (1 - next_signal).sqrt() - (next_signal * (1 - signal) / signal).sqrt()
        pull = self.scale * _class_gradient(self.classifier, noised, times, targets)
        return stepped - by_noise * (1 - signal).sqrt() * pull


def _class_gradient(
    classifier: Classifier, noised: Tensor, timesteps: Tensor, targets: Tensor
) -> Tensor:
    """Gradient of each slice's log p(its target | x_t) with respect to x_t."""
    with torch.enable_grad():
        inputs = noised.detach().requires_grad_(True)
        chosen = classifier(inputs, timesteps).float().log_softmax(1).gather(1, targets[:, None])
        gradient: Tensor = torch.autograd.grad(chosen.sum(), inputs)[0]
    return gradient


def _labelled(net: nn.Module) -> Denoiser:
    return lambda noised, timesteps, labels: net(noised, timesteps, class_labels=labels)


def _guided_by_label(net: nn.Module, scale: float) -> Denoiser:
    """The net's output under classifier-free guidance of `scale`."""
    if scale == 1:
        return _labelled(net)

    def denoise(noised: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        plain: Tensor = net(noised, timesteps, class_labels=torch.full_like(labels, UNCONDITIONAL))
        labelled: Tensor = net(noised, timesteps, class_labels=labels)
        return plain + scale * (labelled - plain)

    return denoise


def _with_label_between(net: nn.Module, tau: float) -> tuple[Denoiser, int]:
    """The net with an added label, `tau` of the way from "no object" to "object", and its index."""
    weight = net.get_parameter(EMBEDDING)
    between = tau * weight[SliceLabel.POSITIVE] + (1 - tau) * weight[SliceLabel.NEGATIVE]
    extended = {EMBEDDING: torch.cat([weight, between[None]])}

    def denoise(noised: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = functional_call(
            net, extended, (noised, timesteps), {"class_labels": labels}
        )
        return output

    return denoise, len(weight)


def _path(timestep: int, steps: int) -> list[tuple[int, int]]:
    """The (upper, lower) timesteps of each step from `timestep` to 0, evenly spaced."""
    stops = [timestep * left // steps for left in range(steps, -1, -1)]
    return list(pairwise(stops))


def _noised(schedule: Schedule, images: Tensor, keys: Sequence[str], timestep: int) -> Tensor:
    noise = key_noise(keys, timestep, 0, images.shape[1:], images.device)
    timesteps = torch.full((len(images),), timestep, device=images.device)
    return schedule.add_noise(images, timesteps, noise)


def _classes(images: Tensor, *classes: int) -> Tensor:
    """Each class once for every image, image by image within a class."""
    return torch.tensor(classes, device=images.device).repeat_interleave(len(images))
