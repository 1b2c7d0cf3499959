"""Class activation maps of the clean classifier: GradCAM, GradCAM++ and LayerCAM.

MONAI has the first two, but its hooks stay on the network, GradCAM++ mixes the images of a batch
(its score of shape (batch,) multiplies along the last axis), and neither takes the difference of
two logits as the score; so the formulas are written out here and tested against MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.config import CamMethod
from cldf_dist.labels import SliceLabel

METHODS: tuple[str, ...] = get_args(CamMethod)


@dataclass(frozen=True)
class CamPass:
    """One forward and backward pass of the clean classifier, from which every map is computed."""

    activation: Float[Tensor, "batch channels map_height map_width"]  # of the layer
    gradient: Float[Tensor, "batch channels map_height map_width"]  # of the score there
    probability: Float[Tensor, " batch"]  # of "object"
    size: tuple[int, int]  # of the images

    def map(self, method: str) -> Float[Tensor, "batch height width"]:
        """The activation map >= 0 on the images' grid, unscaled.

        Raises ValueError for an unknown method.
        """
        formulas = {"gradcam": gradcam, "gradcam_pp": gradcam_pp, "layercam": layercam}
        if method not in formulas:
            raise ValueError(f"CAM methods are {', '.join(METHODS)}; got {method}")
        return _upsample(formulas[method](self.activation, self.gradient), self.size)


def cam_pass(
    net: nn.Module, images: Float[Tensor, "batch channels height width"], layer: str
) -> CamPass:
    """The forward and backward pass over images that all activation maps are computed from.

    The score is the logit of "object" minus that of "no object". `net` is in evaluation mode and
    `layer` names a submodule whose output is >= 0. Raises ValueError for an unknown layer.
    """
    activation, gradient, logits = _activation_and_gradient(net, images, layer)
    size = (images.shape[2], images.shape[3])
    return CamPass(activation, gradient, logits.softmax(1)[:, SliceLabel.POSITIVE], size)


def class_activation_maps(
    net: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    layer: str,
    methods: Sequence[str] = METHODS,
) -> dict[str, Float[Tensor, "batch height width"]]:
    """The maps >= 0 of one `cam_pass`, by method."""
    found = cam_pass(net, images, layer)
    return {method: found.map(method) for method in methods}


def gradcam(
    activation: Float[Tensor, "batch channels height width"],
    gradient: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    """Channels weighted by their mean gradient (Selvaraju et al. 2017)."""
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * activation).sum(1).relu()


def gradcam_pp(
    activation: Float[Tensor, "batch channels height width"],
    gradient: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    """Channels weighted by their positive gradients (Chattopadhay et al. 2018).

    With S the channel's summed activation, the paper's g^2 / (2 g^2 + S g^3) is 1 / (2 + S g);
    only g > 0 counts and S >= 0, so nothing can vanish. The factor exp(score), one number per
    image, is left out: it overflows and says nothing about where the object is.
    """
    positive = gradient.relu()
    summed = activation.sum((2, 3), keepdim=True)
    weights = (positive / (2 + summed * positive)).sum((2, 3), keepdim=True)
    return (weights * activation).sum(1).relu()


def layercam(
    activation: Float[Tensor, "batch channels height width"],
    gradient: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    """Each position weighted by its own positive gradient (Jiang et al. 2021)."""
    return (gradient.relu() * activation).sum(1).relu()


def _activation_and_gradient(
    net: nn.Module, images: Tensor, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of `layer`, the score's gradient with respect to it, and the logits.

    Output and gradient are (batch, channels, height, width) of the layer. Raises ValueError for an
    unknown layer.
    """
    try:
        module = net.get_submodule(layer)
    except AttributeError as error:
        names = ", ".join(name for name, _ in net.named_children())
        raise ValueError(f"cam.layer must be one of {names}, got {layer!r}") from error
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        # a leaf of its own: no graph is built below the layer, and frozen nets work too
        kept.append(output.detach().requires_grad_(True))
        return kept[0]

    handle = module.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = net(images).float()
            (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), kept)
    finally:
        handle.remove()
    return kept[0].detach(), gradient, logits.detach()


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]
