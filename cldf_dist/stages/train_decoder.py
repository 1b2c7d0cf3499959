"""Train the pixel decoder on cached features at seed pixels, and take prototypes from the seeds.

Other methods of the table are trained in the same way, each in a folder of its own. `cldf_plus`
learns from the seeds of the patch classifier, with its activations beside the diffusion features.
Controls without diffusion: where `features.taps` has the slice itself, `raw_patches` learns `cldf`
from it alone; `patch_features` learns `cldf_plus` from the patch classifier's activations alone.
Where training masks are known, `supervised_decoder` and `supervised_plus` learn from them what
`cldf` and `cldf_plus` learn from seeds: the upper bounds, and the only trainings that read a mask.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from cldf_dist.config import Config
from cldf_dist.data.features.pixel_labels import PixelLabels
from cldf_dist.data.features.pixels import PixelsPerItem, SeedPixels, TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.stream import Stream
from cldf_dist.inference.cache_parts import STORE
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.inference.patch_maps import PATCH_TAP, plus_taps
from cldf_dist.inference.run_store import check_same_slices
from cldf_dist.inference.seed_cam import patch_logit_agreement
from cldf_dist.inference.seed_sources import MaskLabels, SeedLabels, patch_logit_labels
from cldf_dist.inference.training_pixels import (
    feature_statistics,
    num_channels,
    prototypes_of,
    training_pixels,
)
from cldf_dist.labels import PixelLabel
from cldf_dist.method.features import patch_size
from cldf_dist.methods import (
    CLDF_PLUS,
    PATCH_FEATURES,
    RAW_PATCHES,
    SUPERVISED,
    SUPERVISED_PLUS,
)
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import (
    broadcast_object,
    processes,
    wait_for_everyone,
)
from cldf_dist.tasks.contrast import Contrast, CrossEntropy
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, load_with_package, write_card
from cldf_dist.training.on_slices import shard_set

NET_CARD = NetCard(
    title="Pixel decoder",
    does=(
        "`net(features)` takes diffusion features (pixels, features) and gives embeddings of unit "
        "length; the class of the nearest prototype (no object, object) is a pixel's. The features "
        "come from the nets of the same run, and from no other."
    ),
    learnt_from="seed pixels of activation and gradient maps; no mask was read in the training",
    loading=load_with_package("load_decoder", "net, prototypes"),
    section="decoder",
    tags=("image-segmentation",),
)
PLUS_CARD = dataclasses.replace(
    NET_CARD,
    title="Pixel decoder of cldf_plus",
    learnt_from="seed pixels of the patch classifier; no mask was read in the training",
)
PATCH_FEATURES_CARD = dataclasses.replace(
    PLUS_CARD,
    title="Pixel decoder of the patch classifier's activations (control)",
    does=(
        "`net(features)` takes the patch classifier's activations (pixels, features) and gives "
        "embeddings of unit length; the class of the nearest prototype (no object, object) is a "
        "pixel's. It shows what `cldf_plus` does without diffusion."
    ),
)
RAW_PATCHES_CARD = dataclasses.replace(
    NET_CARD,
    title="Pixel decoder of raw patches (control)",
    does=(
        "`net(features)` takes the values of the slice in a square around each pixel (pixels, "
        "features) and gives embeddings of unit length; the class of the nearest prototype (no "
        "object, object) is a pixel's. It shows what the method does without diffusion."
    ),
)
SUPERVISED_CARD = dataclasses.replace(
    NET_CARD,
    title="Pixel decoder trained on masks (reference)",
    learnt_from="true masks of the training slices that have one: an upper bound, not the method",
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Train the pixel decoder of each method that has one; returns the seed counts of `cldf`."""
    cache = FeatureCache(run.needs("cache") / STORE)
    shards = shard_set(config, run)
    slices = cached_slices(shards)
    check_same_slices(cache, slices)
    table = slices.tables[0]
    taps = config.features.taps
    pixels = training_pixels(cache, taps, SeedLabels(cache), len(table))
    result = _train(config, run, pixels)
    if run.is_main:
        write_card(run, shards, NET_CARD)
    others = _controls_of_cldf(config, cache)
    if config.patch_classifier.enabled:
        labels = patch_logit_labels(config, cache, *slices.tables)
        result["patch_logit_threshold"] = labels.threshold
        if _trusts_patch_logits(config, cache):
            others += _methods_of_plus(config, labels)
    if config.evaluate.upper_bound and _has_masks(table):
        masks = MaskLabels(table)
        others.append(OtherMethod(SUPERVISED, taps, masks, SUPERVISED_CARD))
        if config.patch_classifier.enabled:
            others.append(OtherMethod(SUPERVISED_PLUS, plus_taps(config), masks, SUPERVISED_CARD))
    for other in others:
        _train_other(config, run, other, cache, shards)
    return result


@dataclasses.dataclass(frozen=True)
class OtherMethod:
    """A method of the table that is trained beside `cldf`."""

    method: str
    taps: tuple[str, ...]
    labels: PixelLabels
    card: NetCard


def _controls_of_cldf(config: Config, cache: FeatureCache) -> list[OtherMethod]:
    taps = config.features.taps
    patches = tuple(tap for tap in taps if patch_size(tap))
    if not (config.evaluate.controls and 0 < len(patches) < len(taps)):
        return []
    return [OtherMethod(RAW_PATCHES, patches, SeedLabels(cache), RAW_PATCHES_CARD)]


def _trusts_patch_logits(config: Config, cache: FeatureCache) -> bool:
    """False, with a message, where patch logits and activation map, two views of one object,
    disagree."""
    seed_cam, least = cache.attributes["seed_cam"], config.plus.min_agreement
    found = patch_logit_agreement(seed_cam)
    if config.plus.cam_threshold == 0 or least == -1 or (found is not None and found >= least):
        return True
    if found is None:
        if processes().is_main:
            print(
                f"train-decoder: plus.min_agreement={least} cannot be checked: no positive "
                "training slice tells how patch logits and activation map agree",
                file=sys.stderr,
            )
        return True
    if processes().is_main:
        print(
            f"train-decoder: {CLDF_PLUS} is left out: on positive training slices the patch "
            f"probability and {seed_cam['map']} have a correlation of {found:.2f}, less than "
            f"plus.min_agreement={least}: one of them does not show the object. "
            "plus.min_agreement=-1 trains it nevertheless",
            file=sys.stderr,
        )
    return False


def _methods_of_plus(config: Config, labels: PixelLabels) -> list[OtherMethod]:
    methods = [OtherMethod(CLDF_PLUS, plus_taps(config), labels, PLUS_CARD)]
    if config.evaluate.controls and config.plus.patch_tap:
        methods.append(OtherMethod(PATCH_FEATURES, (PATCH_TAP,), labels, PATCH_FEATURES_CARD))
    return methods


def _train_other(
    config: Config, run: Run, other: OtherMethod, cache: FeatureCache, shards: ShardSet
) -> None:
    """In its own folder below this stage's, resumed and finished like a stage."""
    own = Run(config, f"{run.stage}/{other.method}", run.sections, run.inputs)
    if broadcast_object(own.is_finished):
        return
    num_slices = len(cached_slices(shards).tables[0])
    pixels = training_pixels(cache, other.taps, other.labels, num_slices)
    if other.method in (CLDF_PLUS, PATCH_FEATURES) and not len(
        pixels.slices_with(PixelLabel.OBJECT)
    ):
        if run.is_main:
            print(
                f"train-decoder: {other.method} is left out: no pixel of a positive training slice "
                "is above both thresholds; raise plus.negative_fraction or lower "
                "plus.cam_threshold",
                file=sys.stderr,
            )
        return
    if run.is_main:
        own.open()
    wait_for_everyone()
    try:
        result = _train(config, own, pixels)
        if run.is_main:
            write_card(own, shards, other.card)
        own.finish(result)
    finally:
        own.close()
    run.stop_requested = run.stop_requested or own.stop_requested


def _train(config: Config, run: Run, pixels: TrainingPixels) -> dict[str, Any]:
    settings = config.decoder
    tap_channels = {tap: num_channels(pixels.cache, tap) for tap in pixels.taps}
    torch.manual_seed(config.seed)  # the same initial weights on every process
    net = PixelDecoder(
        tap_channels, settings.hidden, settings.embedding, settings.dropout, settings.noise
    )
    net.standardise(*feature_statistics(pixels, config.seed))
    _check_enough_seeds(pixels, settings.prototypes_per_class)
    contrast, batch = settings.contrast, settings.fit.batch_size
    numbers = PixelsPerItem(  # the rules of the configuration leave no remainder
        num_object=contrast.object_pixels // batch,
        num_background=contrast.background_pixels // batch,
        hard_negatives=contrast.hard_negatives,
        hard_pool=contrast.hard_pool,
    )
    items = SeedPixels(pixels, numbers, config.seed)
    trained: Any = fit(
        _task(config, net), Stream(items, items.shard_of, config.seed), settings.fit, run
    )
    if run.is_main:
        prototypes = prototypes_of(config, trained, pixels)
        about = {
            "kind": "pixel decoder",
            "tap_channels": tap_channels,
            "features_precision": pixels.cache.attributes["precision"],
            "hidden": settings.hidden,
            "embedding": settings.embedding,
            "prototypes": prototypes.tolist(),
        }
        save_net(trained, run.folder, about)
    return {"slices_with_object_seeds": len(items.positive)}


def _check_enough_seeds(pixels: TrainingPixels, per_class: int) -> None:
    """Before the training, on every process alike."""
    for label, name in ((PixelLabel.BACKGROUND, "background"), (PixelLabel.OBJECT, "object")):
        found = int(pixels.counts[:, label].sum())
        if 0 < found < per_class:
            raise ValueError(
                f"decoder.prototypes_per_class={per_class} needs as many {name} seeds, there are "
                f"{found}"
            )


def _task(config: Config, net: PixelDecoder) -> Contrast | CrossEntropy:
    contrast = config.decoder.contrast
    if config.decoder.loss == "cross_entropy":
        return CrossEntropy(net, temperature=contrast.temperature, seed=config.seed)
    return Contrast(
        net,
        temperature=contrast.temperature,
        seed=config.seed,
        backend=contrast.backend,
        precision=contrast.precision,
        deterministic=contrast.deterministic,
    )


def _has_masks(table: SliceTable) -> bool:
    """True where a training slice has a mask; says so where not all have one."""
    num_masks = int(table.has_mask.sum())
    if num_masks < len(table) and processes().is_main:
        use = "is trained on those alone" if num_masks else "is left out"
        print(
            f"train-decoder: {num_masks} of {len(table)} training slices have a mask; the "
            f"reference method {SUPERVISED} {use}",
            file=sys.stderr,
        )
    return num_masks > 0
