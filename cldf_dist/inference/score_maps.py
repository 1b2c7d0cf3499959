"""The score map of each method, by a function of the method's name.

A score map is (batch, height, width) of prepared slices. Higher means object, and one threshold
must serve all slices. Passes through the nets are shared: each runs once a batch, and only if a
method needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from cldf_dist.config import Config
from cldf_dist.data.features.encoding import as_stored
from cldf_dist.inference.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.inference.patch_maps import PATCH_TAP, PatchMaps, patch_maps
from cldf_dist.labels import SliceLabel
from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method import cam, counterfactual
from cldf_dist.method.features import extract_features, features_dtype
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.methods import method_named
from cldf_dist.nets.decoder import PixelDecoder

Decoder = tuple[PixelDecoder, Tensor]  # and its prototypes


@dataclass
class SliceBatch:
    """A batch of prepared slices, with the outputs of the nets for it, computed on first use."""

    config: Config
    nets: FrozenNets
    decoders: Mapping[str, Decoder]  # by method
    images: Float[Tensor, "batch channels height width"]
    body_mask: Bool[Tensor, "batch height width"]
    keys: list[str]
    methods: Sequence[str]  # that are scored

    @cached_property
    def gradient_map(self) -> tuple[Float[Tensor, "batch height width"], Float[Tensor, " batch"]]:
        """The gradient map and the external classifier's p(object)."""
        return gradient_map_of(self.config, self.nets, self.images, self.keys)

    @cached_property
    def cam_pass(self) -> cam.CamPass:
        """The clean classifier's pass, from which the activation maps are computed."""
        return cam.cam_pass(self.nets.cam, self.images, self.config.cam.layer)

    @cached_property
    def patch_maps(self) -> PatchMaps | None:
        """The patch classifier's maps; None where the run has no patch classifier."""
        if self.nets.patch_classifier is None:
            return None
        return patch_maps(self.nets.patch_classifier, self.images, self.body_mask)

    @cached_property
    def taps(self) -> dict[str, Float[Tensor, "batch _channels _height _width"]]:
        """The features of the pixel decoders, by tap."""
        return decoder_taps(self.config, self.nets, self.images, self.keys, self.patch_maps)

    @cached_property
    def probability(self) -> Float[Tensor, " batch"]:
        """The mean of p(object) over the classifiers of the run; it gates every method."""
        found = [self.gradient_map[1]]
        if set(cam.METHODS) & set(self.methods):
            found.append(self.cam_pass.probability)
        else:  # without a map no gradient is needed
            found.append(slice_probability(self.nets.cam, self.images))
        if self.patch_maps is not None:
            found.append(self.patch_maps.probability)
        return torch.stack(found).mean(0)

    def scaled(
        self, maps: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch height width"]:
        """Each map scaled to [0, 1] within its body, times p(object) of its slice.

        The map tells where the object is, the probability whether there is one: only their product
        can be compared with one threshold over slices.
        """
        return scale_to_unit(maps, self.body_mask) * self.probability[:, None, None]


def score_map(batch: SliceBatch, method: str) -> Float32[Tensor, "batch height width"]:
    """The score map of one method."""
    if method_named(method).has_decoder:
        return decoder_scores(batch, method)
    score: Callable[[SliceBatch], Tensor] = getattr(sys.modules[__name__], method)
    return score(batch).float()


def gradcam(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """GradCAM of the clean classifier, scaled by slice and p(object)."""
    return batch.scaled(batch.cam_pass.map("gradcam"))


def gradcam_pp(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """GradCAM++ of the clean classifier, scaled by slice and p(object)."""
    return batch.scaled(batch.cam_pass.map("gradcam_pp"))


def layercam(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """LayerCAM of the clean classifier, scaled by slice and p(object)."""
    return batch.scaled(batch.cam_pass.map("layercam"))


def gradient_map(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """The external classifier's gradient map, scaled by slice and p(object)."""
    return batch.scaled(batch.gradient_map[0])


def cdm(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """CDM saliency by condition flip, by the settings `saliency`."""
    settings = batch.config.saliency
    return counterfactual.cdm_saliency(
        batch.nets.diffusion,
        batch.nets.schedule,
        batch.images,
        batch.keys,
        timesteps=settings.timesteps,
        num_noise_samples=settings.num_noise_samples,
        smooth_pixels=settings.smooth_pixels,
    )


def cg_diff(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """Saliency by a classifier-guided counterfactual, by the settings `cg_diff`."""
    settings = batch.config.cg_diff
    return counterfactual.cg_diff(
        batch.nets.diffusion,
        batch.nets.classifier,
        batch.nets.schedule,
        batch.images,
        batch.keys,
        timestep=settings.timestep,
        steps=settings.steps,
        scale=settings.scale,
        inversion=settings.inversion,
        smooth_pixels=settings.smooth_pixels,
        label_scale=settings.label_scale,
    )


def cg_cdm(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """Saliency by the derivative with respect to the label, by the settings `cg_cdm`."""
    settings = batch.config.cg_cdm
    return counterfactual.cg_cdm(
        batch.nets.diffusion,
        batch.nets.classifier,
        batch.nets.schedule,
        batch.images,
        batch.keys,
        timestep=settings.timestep,
        steps=settings.steps,
        scale=settings.scale,
        tau=settings.tau,
        smooth_pixels=settings.smooth_pixels,
    )


def patch_classifier(batch: SliceBatch) -> Float[Tensor, "batch height width"]:
    """The sigmoid of the patch logits; raises ValueError where there is no patch classifier."""
    if batch.patch_maps is None:
        raise ValueError("the method patch_classifier needs patch_classifier.enabled=true")
    return batch.patch_maps.patch_logits.sigmoid()


@torch.no_grad()
def decoder_scores(batch: SliceBatch, method: str) -> Float32[Tensor, "batch height width"]:
    """The scores of a method that has a pixel decoder; all such methods share the features."""
    size = (batch.images.shape[2], batch.images.shape[3])
    return prototype_scores(
        *batch.decoders[method], batch.taps, size, tile_pixels=batch.config.segment.tile_pixels
    )


def prototype_scores(
    decoder: PixelDecoder,
    prototypes: Float[Tensor, "prototypes embedding"],
    taps: Mapping[str, Float[Tensor, "batch _channels _height _width"]],
    size: tuple[int, int],
    *,
    tile_pixels: int,
) -> Float32[Tensor, "batch height width"]:
    """The scores of whole slices on a grid of `size`; no embedding is kept.

    `taps` are those of `PixelDecoder.embed_maps`, `prototypes` those of `class_prototypes`.
    """
    first = next(iter(taps.values()))
    scores = first.new_empty(len(first), *size, dtype=torch.float32)
    for place, embedding in decoder.embed_tiles(taps, size, tile_pixels=tile_pixels):
        scores[place] = prototype_score(embedding, prototypes)
    return scores


@torch.no_grad()
def decoder_taps(
    config: Config,
    nets: FrozenNets,
    images: Float[Tensor, "batch channels height width"],
    keys: Sequence[str],
    patches: PatchMaps | None = None,
) -> dict[str, Float[Tensor, "batch _channels _height _width"]]:
    """The features of prepared slices by tap, rounded as in the feature store.

    So they have the values that the decoders were trained on.
    """
    settings = config.features
    dtype = features_dtype(settings, images.device)
    features = extract_features(
        nets.diffusion, nets.schedule, images, keys, settings, dtype, nets.cam
    )
    if patches is not None and config.plus.patch_tap:
        features[PATCH_TAP] = patches.activations
    return {tap: as_stored(features.pop(tap), settings.storage) for tap in list(features)}


@torch.no_grad()
def slice_probability(
    classifier: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, " batch"]:
    """The classifier's p(object) of clean slices."""
    logits: Tensor = classifier(images)
    return logits.float().softmax(1)[:, SliceLabel.POSITIVE]
