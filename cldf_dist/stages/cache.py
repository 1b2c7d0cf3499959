"""Diffusion features, gradient maps, CAMs and seeds of training and validation slices, once.

Each rank owns a contiguous run of cache shards and is their only writer; shards that are done are
not made again. The same functions serve `segment`, where the maps are computed on the fly.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cldf_dist.config import Config, Features, to_plain
from cldf_dist.data.cache import FeatureCache
from cldf_dist.data.shards import ShardSet, SliceTable
from cldf_dist.data.slices import foreground
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.features import extract_features, tap_shapes
from cldf_dist.method.gradient_map import gradient_map
from cldf_dist.method.noise import Schedule
from cldf_dist.method.seeds import scale_to_unit, seed_labels, seed_quality
from cldf_dist.nets.unet import build_unet
from cldf_dist.processes import accelerator, processes, wait_for_everyone
from cldf_dist.progress import progress
from cldf_dist.run import Run
from cldf_dist.stages.loading import load_cam, load_classifier, load_diffusion, shard_set

STORE = "features.zarr"
CACHED_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class FrozenNets:
    """The trained nets that make features and maps, on this process's device."""

    diffusion: nn.Module
    schedule: Schedule
    classifier: nn.Module
    cam: nn.Module

    @classmethod
    def load(cls, run: Run) -> FrozenNets:
        diffusion, schedule = load_diffusion(run.needs("train-diffusion"))
        return cls(
            diffusion,
            schedule,
            load_classifier(run.needs("train-classifier")),
            load_cam(run.needs("train-cam")),
        )


@dataclass(frozen=True)
class Slices:
    """Prepared slices of training and validation patients, as one numbered list."""

    tables: tuple[SliceTable, ...]

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables)

    def place(self, row: int) -> tuple[SliceTable, int]:
        for table in self.tables:
            if row < len(table):
                return table, row
            row -= len(table)
        raise IndexError(row)

    @property
    def keys(self) -> list[str]:
        return [key for table in self.tables for key in table.keys]


def run(config: Config, run: Run) -> dict[str, Any]:
    shards = shard_set(config, run)
    slices = cached_slices(shards)
    nets = FrozenNets.load(run)
    folder = run.folder / STORE
    if run.is_main:
        _check_space(config, run.folder, nets.diffusion, len(slices))
        if not (folder / "zarr.json").exists():
            _create(config, folder, nets.diffusion, len(slices))
        FeatureCache(folder).sweep()
    wait_for_everyone()
    cache = FeatureCache(folder)
    check_same_slices(cache, slices)
    mine = _owned_shards(cache.num_shards)
    todo = [shard for shard in mine if not cache.is_done(shard)]
    total = sum(len(cache.rows_of(shard)) for shard in mine)
    with progress("cache", total, "slices", shown=run.is_main) as bar:
        bar.start_at(total - sum(len(cache.rows_of(shard)) for shard in todo))
        for shard in todo:
            keys, values = compute_shard(config, nets, slices, cache.rows_of(shard))
            cache.write_shard(shard, keys, values)
            bar.advance(len(keys))
    wait_for_everyone()
    return {"seeds": _seed_report(cache, slices), "slices": len(cache)} if run.is_main else {}


def cached_slices(shards: ShardSet) -> Slices:
    """The slices that the cache holds, in its order."""
    return Slices(tuple(shards.split(name) for name in CACHED_SPLITS))


def check_same_slices(cache: FeatureCache, slices: Slices) -> None:
    """Raise ValueError unless row n of the cache is, or will be, slice n."""
    keys = slices.keys
    same = len(cache) == len(keys)
    if not same or any(stored not in ("", key) for stored, key in zip(cache.keys, keys)):
        raise ValueError(
            f"{cache.folder} was made for other slices than those prepared now (damaged slices "
            "that data.on_damaged=skip drops change the list); delete the cache stage's folder and "
            "run it again"
        )


def compute_shard(
    config: Config, nets: FrozenNets, slices: Slices, rows: range
) -> tuple[list[str], dict[str, Any]]:
    """Keys and arrays of the slices `rows`; batches never cross a shard."""
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    for start in range(rows.start, rows.stop, config.cache.batch_size):
        batch = range(start, min(start + config.cache.batch_size, rows.stop))
        placed = [slices.place(row) for row in batch]
        images = np.stack([table.read_image(row) for table, row in placed])
        batch_keys = [table.keys[row] for table, row in placed]
        labels = torch.tensor([int(table.labels[row]) for table, row in placed])
        parts.append(_compute_batch(config, nets, images, batch_keys, labels))
        keys += batch_keys
    return keys, {
        name: torch.cat([part[name].cpu() for part in parts]).numpy() for name in parts[0]
    }


def _compute_batch(
    config: Config, nets: FrozenNets, images: Any, keys: list[str], labels: Tensor
) -> dict[str, Tensor]:
    device = accelerator().device
    inside = torch.from_numpy(foreground(images)).to(device)
    pixels = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
    labels = labels.to(device)
    maps, probability = gradient_map_of(config, nets, pixels, keys)
    cams = class_activation_maps(nets.cam, pixels, config.cam.layer, (config.cam.seed_method,))
    cam = cams[config.cam.seed_method]
    seeds = seed_labels(
        scale_to_unit(maps, inside),
        scale_to_unit(cam, inside),
        inside,
        labels,
        rule=config.seeds.rule,
        foreground_cut=config.seeds.foreground,
        background_cut=config.seeds.background,
        negative_slices=config.seeds.negative_slices,
    )
    features = extract_features(nets.diffusion, nets.schedule, pixels, keys, config.features)
    stored = {tap: half_pixel_major(value) for tap, value in features.items()}
    return {
        **stored,
        "gradient_map": maps.half(),
        "cam": cam.half(),
        "seeds": seeds,
        "label": labels.to(torch.int8),
        "probability": probability.float(),
    }


def gradient_map_of(
    config: Config, nets: FrozenNets, images: Tensor, keys: list[str]
) -> tuple[Tensor, Tensor]:
    """Gradient maps and p(object) as configured, for `cache` and `segment` alike."""
    settings = config.gradient_map
    return gradient_map(
        nets.classifier,
        nets.schedule,
        images,
        keys,
        noise_levels=settings.noise_levels,
        draws=settings.draws,
        smooth_pixels=settings.smooth_pixels,
    )


def half_pixel_major(features: Tensor) -> Tensor:
    """(batch, levels, channels, h, w) -> float16 (batch, levels, h, w, channels), as stored."""
    return features.permute(0, 1, 3, 4, 2).half().contiguous()


def row_shapes(
    net: nn.Module, image_size: int, features: Features
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of one slice of every cached array."""
    square = (image_size, image_size)
    taps = {
        tap: ((levels, height, width, channels), "float16")
        for tap, (levels, channels, height, width) in tap_shapes(net, image_size, features).items()
    }
    return {
        **taps,
        "gradient_map": (square, "float16"),
        "cam": (square, "float16"),
        "seeds": (square, "int8"),
        "label": ((), "int8"),
        "probability": ((), "float32"),
    }


def bytes_per_slice(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes.values())


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """What `--dry-run` prints: bytes before anything is computed."""
    net = build_unet(config.diffusion.net, 4)  # the number of image channels changes no tap
    size = bytes_per_slice(row_shapes(net, config.data.image_size, config.features))
    result = {"size": f"{size / 1e6:.2f} MB per slice, {size * 1e5 / 1e12:.2f} TB per 100,000"}
    manifest = folder.parent / "prepare" / "manifest.json"
    if manifest.exists():
        count = len(cached_slices(ShardSet(manifest.parent)))
        result["slices"] = f"{count}, together {count * size / 1e9:.2f} GB"
    return result


def _create(config: Config, folder: Path, net: nn.Module, num_slices: int) -> None:
    FeatureCache.create(
        folder,
        num_slices,
        row_shapes(net, config.data.image_size, config.features),
        slices_per_shard=config.cache.slices_per_shard,
        attributes={"features": to_plain(config.features), "seeds": to_plain(config.seeds)},
    )


def _check_space(config: Config, folder: Path, net: nn.Module, num_slices: int) -> None:
    if (folder / STORE / "zarr.json").exists():
        return
    size = bytes_per_slice(row_shapes(net, config.data.image_size, config.features)) * num_slices
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the cache needs {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; "
            "take fewer features.taps or features.noise_levels, or another disk with runs=FOLDER"
        )


def _owned_shards(num_shards: int) -> range:
    """This rank's contiguous share."""
    rank, world_size = processes().rank, processes().world_size
    return range(num_shards * rank // world_size, num_shards * (rank + 1) // world_size)


def _seed_report(cache: FeatureCache, slices: Slices) -> dict[str, Any]:
    """Precision and recall of the seeds of positive training slices, where masks are known.

    A diagnostic for the report: nothing is trained or chosen by it.
    """
    table = slices.tables[0]
    seeds, masks = [], []
    for row in np.flatnonzero(table.labels == 1):
        mask = table.read_mask(int(row))
        if mask is not None:
            seeds.append(torch.from_numpy(cache.read("seeds", int(row)).copy()))  # it is read-only
            masks.append(torch.from_numpy(mask))
    if not masks:
        return {}
    quality = seed_quality(torch.stack(seeds), torch.stack(masks))
    report = {name: None if np.isnan(value) else value for name, value in quality.items()}
    return {
        **report,
        "slices": len(masks),
        "object_seeds_per_slice": quality["object_seeds"] / len(masks),
    }
