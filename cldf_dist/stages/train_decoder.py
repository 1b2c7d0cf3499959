"""Train the pixel decoder on cached features at seed pixels, and take prototypes from the seeds.

Where training masks are known, a second decoder is trained on them in the same way: the upper
bound `supervised_decoder` of the table. It is the only training that reads a mask.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.config import Config
from cldf_dist.data.cache import FeatureCache
from cldf_dist.data.pixels import SeedPixels, gather_pixels
from cldf_dist.data.shards import ShardSet
from cldf_dist.data.slices import foreground
from cldf_dist.data.stream import Stream
from cldf_dist.fit import fit
from cldf_dist.method.prototypes import class_prototypes
from cldf_dist.model_card import NetCard, load_with_package, write_card
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.processes import accelerator, from_main, processes, wait_for_everyone
from cldf_dist.run import Run
from cldf_dist.seeding import sample_seed
from cldf_dist.stages.cache import STORE, Slices, cached_slices, check_same_slices
from cldf_dist.stages.loading import shard_set
from cldf_dist.stages.masks import SUPERVISED
from cldf_dist.tasks.contrast import Contrast
from cldf_dist.weights import save_net

STATISTICS_SLICES = 256  # training slices behind the mean and spread of each feature

NET_CARD = NetCard(
    title="Pixel decoder",
    does=(
        "`net(features)` takes diffusion features (pixels, features) and gives embeddings of unit "
        "length; the nearer of the two prototypes (no object, object) is a pixel's class. "
        "The features come from the diffusion model of the same run, and from no other."
    ),
    learnt_from="seed pixels of activation and gradient maps; no mask was read in the training",
    loading=load_with_package("load_decoder", "net, prototypes"),
    section="decoder",
    tags=("image-segmentation",),
)
SUPERVISED_CARD = dataclasses.replace(
    NET_CARD,
    title="Pixel decoder trained on masks (reference)",
    learnt_from="true masks of the training slices that have one: an upper bound, not the method",
)

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class TrainingPixels:
    """The cache with a label for each pixel of its training slices, and where they came from."""

    cache: FeatureCache
    taps: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # cache rows of the training slices
    labels: Labels  # (slices, height, width) 1 object, 0 background, -1 unknown


def run(config: Config, run: Run) -> dict[str, Any]:
    cache = FeatureCache(run.needs("cache") / STORE)
    shards = shard_set(config, run)
    slices = cached_slices(shards)
    check_same_slices(cache, slices)
    rows = np.arange(len(slices.tables[0]))
    seeds = np.stack([cache.read("seeds", int(row)) for row in rows])
    pixels = TrainingPixels(cache, config.features.taps, rows, seeds)
    result = _train(config, run, pixels)
    if run.is_main:
        write_card(run, shards, NET_CARD)
    truth = _true_labels(slices) if config.evaluate.upper_bound else None
    if truth is not None:
        masked = TrainingPixels(cache, config.features.taps, rows, truth)
        _train_supervised(config, run, masked, shards)
    return result


def _train_supervised(config: Config, run: Run, pixels: TrainingPixels, shards: ShardSet) -> None:
    """The reference row: its own folder below this stage's, resumed and finished like a stage."""
    reference = Run(config, f"{run.stage}/{SUPERVISED}", run.sections, run.inputs)
    if from_main(reference.is_finished):
        return
    if run.is_main:
        reference.open()
    wait_for_everyone()
    try:
        result = _train(config, reference, pixels)
        if run.is_main:
            write_card(reference, shards, SUPERVISED_CARD)
        reference.finish(result)
    finally:
        reference.close()
    run.stop_requested = run.stop_requested or reference.stop_requested


def _train(config: Config, run: Run, pixels: TrainingPixels) -> dict[str, Any]:
    settings = config.decoder
    tap_channels = {tap: _channels(pixels.cache, tap) for tap in pixels.taps}
    torch.manual_seed(config.seed)  # the same initial weights on every process
    net = PixelDecoder(
        tap_channels, settings.hidden, settings.embedding, settings.dropout, settings.noise
    )
    net.standardise(*feature_statistics(pixels, config.seed))
    batch = settings.fit.batch_size
    items = SeedPixels(
        pixels.cache,
        pixels.taps,
        rows=pixels.rows,
        seeds=pixels.labels,
        num_foreground=settings.contrast.foreground_pixels // batch,
        num_background=settings.contrast.background_pixels // batch,
        seed=config.seed,
    )
    contrast = settings.contrast
    task = Contrast(
        net,
        temperature=contrast.temperature,
        seed=config.seed,
        backend=contrast.backend,
        precision=contrast.precision,
        deterministic=contrast.deterministic,
    )
    trained: Any = fit(task, Stream(items, items.shard_of, config.seed), settings.fit, run)
    if run.is_main:
        prototypes = _prototypes(config, trained, pixels)
        about = {
            "kind": "pixel decoder",
            "tap_channels": tap_channels,
            "hidden": settings.hidden,
            "embedding": settings.embedding,
            "prototypes": prototypes.tolist(),
        }
        save_net(trained, run.folder, about)
    return {"slices_with_object_seeds": len(items.positive)}


def feature_statistics(pixels: TrainingPixels, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature over a sample of the training slices."""
    rng = np.random.default_rng(sample_seed(seed, 0, "feature statistics"))
    rows = rng.permutation(pixels.rows)[:STATISTICS_SLICES]
    means, spreads = [], []
    for tap in pixels.taps:
        count, total, squares = 0, np.zeros(_channels(pixels.cache, tap)), 0.0
        for row in rows:
            stored = pixels.cache.read(tap, int(row)).astype(np.float64)
            flat = stored.transpose(1, 2, 0, 3).reshape(-1, total.size)
            count += len(flat)
            total = total + flat.sum(0)
            squares = squares + np.square(flat).sum(0)
        mean = total / count
        means.append(mean)
        spreads.append(np.sqrt(np.maximum(squares / count - mean**2, 1e-12)))
    return (
        torch.from_numpy(np.concatenate(means)).float(),
        torch.from_numpy(np.concatenate(spreads)).float(),
    )


def _prototypes(config: Config, net: PixelDecoder, pixels: TrainingPixels) -> torch.Tensor:
    """Mean embedding of a random choice of training seeds of each class, unit length (2, E)."""
    rng = np.random.default_rng(sample_seed(config.seed, 0, "prototypes"))
    embeddings, labels = [], []
    for label in (0, 1):
        having = [row for row in pixels.rows if (pixels.labels[row] == label).any()]
        per_slice = -(-config.decoder.prototype_pixels // len(having))
        for row in having:
            features = _features_of(pixels, int(row), label, per_slice, rng)
            with torch.no_grad():
                embeddings.append(net(torch.from_numpy(features).to(accelerator().device)).cpu())
            labels.append(torch.full((len(features),), label))
    return class_prototypes(torch.cat(embeddings), torch.cat(labels))


def _features_of(
    pixels: TrainingPixels, row: int, label: int, limit: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    height, width = pixels.labels.shape[1:]
    candidates = np.flatnonzero(pixels.labels[row] == label)
    chosen = rng.permutation(candidates)[:limit]
    places = np.stack(np.divmod(chosen, width), axis=1)
    return gather_pixels(pixels.cache, pixels.taps, row, places, (height, width))


def _true_labels(slices: Slices) -> Labels | None:
    """True masks of the training slices as pixel labels: -1 where a slice has no mask and outside
    the subject; None where no slice has one."""
    table = slices.tables[0]
    labels, num_masks = [], 0
    for row in range(len(table)):
        inside = foreground(table.read_image(row))
        mask = table.read_mask(row)
        num_masks += mask is not None
        known = inside & (mask is not None)
        labels.append(np.where(known, 0 if mask is None else mask, -1).astype(np.int8))
    if num_masks < len(table) and processes().is_main:
        use = "is trained on those alone" if num_masks else "is left out"
        print(
            f"train-decoder: {num_masks} of {len(table)} training slices have a mask; the "
            f"reference row {SUPERVISED} {use}",
            file=sys.stderr,
        )
    return np.stack(labels) if num_masks else None


def _channels(cache: FeatureCache, tap: str) -> int:
    levels, _, _, channels = cache.row_shape(tap)
    return levels * channels
