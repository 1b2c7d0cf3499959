"""The score map of each method, by a function of the method's name.

A score map is (batch, height, width) of prepared slices. Higher means object, and one threshold
must hold for all slices. Passes through the nets are shared: each is made once a batch, and only if
a method asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
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
    """A batch of prepared slices, and the passes through the nets of a run over it."""

    config: Config
    nets: FrozenNets
    decoders: Mapping[str, Decoder]  # by method
    images: Tensor  # (batch, channels, height, width)
    body_mask: Tensor  # (batch, height, width)
    keys: list[str]
    methods: Sequence[str]  # that are scored

    @cached_property
    def gradient_map(self) -> tuple[Tensor, Tensor]:
        """The gradient map (batch, height, width) and the external classifier's p(object)."""
        return gradient_map_of(self.config, self.nets, self.images, self.keys)

    @cached_property
    def cam_pass(self) -> cam.CamPass:
        return cam.cam_pass(self.nets.cam, self.images, self.config.cam.layer)

    @cached_property
    def patch_maps(self) -> PatchMaps | None:
        """None where the run has no patch classifier."""
        if self.nets.patch_classifier is None:
            return None
        return patch_maps(self.nets.patch_classifier, self.images, self.body_mask)

    @cached_property
    def taps(self) -> dict[str, Tensor]:
        return decoder_taps(self.config, self.nets, self.images, self.keys, self.patch_maps)

    @cached_property
    def probability(self) -> Tensor:
        """p(object) (batch,), the mean over the classifiers of the run; it gates every method."""
        found = [self.gradient_map[1]]
        if set(cam.METHODS) & set(self.methods):
            found.append(self.cam_pass.probability)
        else:  # without a map no gradient is needed
            found.append(slice_probability(self.nets.cam, self.images))
        if self.patch_maps is not None:
            found.append(self.patch_maps.probability)
        return torch.stack(found).mean(0)

    def scaled(self, maps: Tensor) -> Tensor:
        """A map scaled to [0, 1] within its slice, which says where, times p(object), which says
        whether: only the product can be compared with one threshold over slices."""
        return scale_to_unit(maps, self.body_mask) * self.probability[:, None, None]


def score_map(batch: SliceBatch, method: str) -> Tensor:
    """The score map (batch, height, width) of one method, float32."""
    if method_named(method).has_decoder:
        return decoder_scores(batch, method)
    score: Callable[[SliceBatch], Tensor] = getattr(sys.modules[__name__], method)
    return score(batch).float()


def gradcam(batch: SliceBatch) -> Tensor:
    return batch.scaled(batch.cam_pass.map("gradcam"))


def gradcam_pp(batch: SliceBatch) -> Tensor:
    return batch.scaled(batch.cam_pass.map("gradcam_pp"))


def layercam(batch: SliceBatch) -> Tensor:
    return batch.scaled(batch.cam_pass.map("layercam"))


def gradient_map(batch: SliceBatch) -> Tensor:
    return batch.scaled(batch.gradient_map[0])


def cdm(batch: SliceBatch) -> Tensor:
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


def cg_diff(batch: SliceBatch) -> Tensor:
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


def cg_cdm(batch: SliceBatch) -> Tensor:
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


def patch_classifier(batch: SliceBatch) -> Tensor:
    if batch.patch_maps is None:
        raise ValueError("the method patch_classifier needs patch_classifier.enabled=true")
    return batch.patch_maps.patch_logits.sigmoid()


@torch.no_grad()
def decoder_scores(batch: SliceBatch, method: str) -> Tensor:
    """The scores of a method that has a pixel decoder; features are extracted once for all."""
    size = (batch.images.shape[2], batch.images.shape[3])
    return prototype_scores(
        *batch.decoders[method], batch.taps, size, tile_pixels=batch.config.segment.tile_pixels
    )


def prototype_scores(
    decoder: PixelDecoder,
    prototypes: Tensor,
    taps: Mapping[str, Tensor],
    size: tuple[int, int],
    *,
    tile_pixels: int,
) -> Tensor:
    """The scores (batch, *size) of whole slices, of which no embedding is kept.

    `taps` is as in `PixelDecoder.embed_maps`, `prototypes` as of `class_prototypes`.
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
    images: Tensor,
    keys: Sequence[str],
    patches: PatchMaps | None = None,
) -> dict[str, Tensor]:
    """{tap: (batch, channels, h, w)} of prepared slices (batch, channels, height, width), with the
    values that the decoders were trained on: rounded as in the feature store."""
    settings = config.features
    dtype = features_dtype(settings, images.device)
    features = extract_features(
        nets.diffusion, nets.schedule, images, keys, settings, dtype, nets.cam
    )
    if patches is not None and config.plus.patch_tap:
        features[PATCH_TAP] = patches.activations
    return {tap: as_stored(features.pop(tap), settings.storage) for tap in list(features)}


@torch.no_grad()
def slice_probability(classifier: nn.Module, images: Tensor) -> Tensor:
    """p(object) (batch,) of clean slices (batch, channels, height, width)."""
    logits: Tensor = classifier(images)
    return logits.float().softmax(1)[:, SliceLabel.POSITIVE]
