"""Diffusion features, gradient maps, CAMs and seeds of training and validation slices, once.

Each process owns a contiguous run of cache shards and is their only writer; shards that are done
are not made again. The same functions serve `segment`, where the maps are computed on the fly.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cldf_dist.config import Config, Mark, flatten, marked
from cldf_dist.data.features.chunk_file import DamagedShardError
from cldf_dist.data.features.encoding import to_stored
from cldf_dist.data.features.store import SCALE, FeatureCache, encoded_key
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.cache_parts import (
    STORE,
    part_of,
    repair,
    shards_of_this_rank,
    shared_stage,
    store_folder,
)  # fmt: skip
from cldf_dist.inference.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.inference.loading import shard_set
from cldf_dist.inference.patch_maps import PATCH_LOGITS, PATCH_TAP, patch_maps
from cldf_dist.inference.seed_cam import FALLBACK, choose_seed_cam, with_map
from cldf_dist.inference.seed_sources import SeedLabels, seed_report
from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.features import extract_features, features_dtype, tap_shapes
from cldf_dist.method.seeds import seed_labels
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator, fail_on_all_ranks, processes
from cldf_dist.system.memory_format import fast_memory_format
from cldf_dist.system.progress import progress
from cldf_dist.training.time_estimate import in_words

__all__ = ["STORE", "Slices", "cached_slices", "check_same_slices"]

CACHED_SPLITS = ("train", "validation")
TIMED_SLICES = 4


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


def execute(config: Config, run: Run) -> dict[str, Any]:
    """The whole cache, or with `cache.part` one job's share of it, or with `cache.verify` a look
    for damage first."""
    slices = cached_slices(shard_set(config, run))
    nets = FrozenNets.load(config, run)
    with ExitStack() as held:
        with fail_on_all_ranks():
            if run.is_main and config.cache.part:
                held.enter_context(shared_stage(config))
            if run.is_main:
                _check_keys(slices)
        seed_cam = choose_seed_cam(config, nets, slices.tables[0], store_folder(config))
        with fail_on_all_ranks():
            if run.is_main:
                empty = partial(_create, config, run, nets.diffusion, len(slices), seed_cam)
                if config.cache.verify:
                    _repair_metadata(config, run, empty)
                _check_space(config, slices)
                empty(store_folder(config))
        with fail_on_all_ranks():
            cache = FeatureCache(store_folder(config))
            _check_same_settings(cache, config, run)
            _check_count(cache, slices)
        config = _as_begun(config, cache)
        damaged: list[str] = []
        if config.cache.verify:
            damaged = repair(config, cache, slices.keys)
            cache = FeatureCache(cache.folder)  # what others discarded is not done
        with fail_on_all_ranks():
            check_same_slices(cache, slices)
            scope = part_of(range(cache.num_shards), config.cache.part)
            cache.sweep(shards_of_this_rank(scope))
        _extract(config, nets, slices, cache, scope)
    if not run.is_main:
        return {}
    num_slices = sum(len(cache.rows_of(shard)) for shard in scope)
    result: dict[str, Any] = {"slices": num_slices, "seed_cam": config.seeds.cam}
    if config.cache.verify:
        result["damaged"] = damaged
    if config.cache.part:
        return result
    return {"seeds": seed_report(SeedLabels(cache), slices.tables[0]), **result}


def _extract(
    config: Config, nets: FrozenNets, slices: Slices, cache: FeatureCache, scope: range
) -> None:
    """Make the shards of `scope` that are not done; each process its own, in order."""
    mine = shards_of_this_rank(scope)
    total = sum(len(cache.rows_of(shard)) for shard in scope)
    main = processes().is_main
    with progress("cache", total, "slices", shown=main) as bar:
        bar.start_at(cache.num_done(scope))
        # writing waits for the disk: the next shard is computed meanwhile
        with fail_on_all_ranks(), ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for shard in mine:
                if cache.is_done(shard):
                    continue
                keys, values = compute_shard(config, nets, slices, cache.rows_of(shard))
                if writing is not None:
                    writing.result()
                writing = writer.submit(cache.write_shard, shard, keys, values)
                if main and bar.is_due():
                    bar.advance(cache.num_done(scope) - bar.done)
            if writing is not None:
                writing.result()
        if main:
            bar.advance(cache.num_done(scope) - bar.done)


def cached_slices(shards: ShardSet) -> Slices:
    """The slices that the cache holds, in its order."""
    return Slices(tuple(shards.split(name) for name in CACHED_SPLITS))


def check_same_slices(cache: FeatureCache, slices: Slices) -> None:
    """Raise ValueError unless row n of the cache is, or will be, slice n."""
    _check_count(cache, slices)
    if any(stored not in ("", key) for stored, key in zip(cache.keys, slices.keys)):
        raise _other_slices(cache)


def _check_count(cache: FeatureCache, slices: Slices) -> None:
    if len(cache) != len(slices):
        raise _other_slices(cache)


def _other_slices(cache: FeatureCache) -> ValueError:
    return ValueError(
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
    inside = torch.from_numpy(body_mask(images)).to(device)
    pixels = (
        torch.from_numpy(images).to(device).contiguous(memory_format=fast_memory_format(device))
    )
    labels = labels.to(device)
    maps, probability = gradient_map_of(config, nets, pixels, keys)
    cams = class_activation_maps(nets.cam, pixels, config.cam.layer, (config.seeds.cam,))
    cam = cams[config.seeds.cam]
    seeds = seed_labels(
        scale_to_unit(maps, inside),
        scale_to_unit(cam, inside),
        inside,
        labels,
        rule=config.seeds.rule,
        object_threshold=config.seeds.object_threshold,
        background_threshold=config.seeds.background_threshold,
        negative_slices=config.seeds.negative_slices,
    )
    features = extract_features(
        nets.diffusion,
        nets.schedule,
        pixels,
        keys,
        config.features,
        features_dtype(config.features, device),
        nets.cam,
    )
    stored: dict[str, Tensor] = {}
    if nets.patch_classifier is not None:
        found = patch_maps(nets.patch_classifier, pixels, inside)
        stored[PATCH_LOGITS] = found.patch_logits.half()
        if config.plus.patch_tap:
            features[PATCH_TAP] = found.activations
    for tap, value in features.items():
        stored |= to_stored(tap, value, config.features.storage)
    return {
        **stored,
        "gradient_map": maps.half(),
        "cam": cam.half(),
        "seeds": seeds,
        "label": labels.to(torch.int8),
        "probability": probability.float(),
    }


def row_shapes(net: nn.Module, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of one slice of every cached array."""
    features, image_size, patches = config.features, config.data.image_size, config.patch_classifier
    square = (image_size, image_size)
    taps: dict[str, tuple[tuple[int, ...], str]] = {}
    shapes = tap_shapes(net, image_size, features, config.cam.channels)
    if patches.enabled:
        taps[PATCH_LOGITS] = (square, "float16")
        if config.plus.patch_tap:
            side = image_size // patches.downsample
            shapes[PATCH_TAP] = (1, patches.channels, side, side)
    for tap, (levels, channels, height, width) in shapes.items():
        taps[tap] = ((levels, height, width, channels), features.storage)
        if features.storage == "int8":
            taps[tap + SCALE] = ((levels, channels), "float32")
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
    """What `--dry-run` prints: bytes and time before anything is computed."""
    num_channels = len(datasets.channels(config.data))
    nets = FrozenNets.untrained(config, num_channels)
    shapes = row_shapes(nets.diffusion, config)
    size = bytes_per_slice(shapes)
    result = {"size": f"{size / 1e6:.2f} MB per slice, {size * 1e5 / 1e12:.2f} TB per 100,000"}
    seconds = _seconds_per_slice(config, nets, num_channels)
    pace = f"{seconds:.2g} s per slice on this machine's {accelerator().device.type}"
    manifest = config.run_folder / "prepare" / "manifest.json"
    if not manifest.exists():
        return {**result, "time": pace}
    count = len(cached_slices(ShardSet(manifest.parent)))
    free = shutil.disk_usage(_existing(folder)).free
    result["slices"] = (
        f"{count}, together {count * size / 1e9:.2f} GB; the disk has {free / 1e9:.2f} GB free"
    )
    if config.cache.part:
        count = -(-count // int(config.cache.part.split("/")[1]))
    whole = in_words(seconds * count / processes().world_size)
    result["time"] = f"about {whole}, {processes().world_size} process(es), {pace}"
    return result


def _seconds_per_slice(config: Config, nets: FrozenNets, num_channels: int) -> float:
    """One batch of made-up slices, timed after another that sets things up."""
    side, count = config.data.image_size, min(config.cache.batch_size, TIMED_SLICES)
    images = np.random.default_rng(0).uniform(-1, 1, (count, num_channels, side, side))
    keys = [f"made up {number}" for number in range(count)]
    if config.seeds.cam == "auto":
        config = with_map(config, FALLBACK)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        labels = torch.ones(count, dtype=torch.long)
        batch = _compute_batch(config, nets, images.astype(np.float32), keys, labels)
        batch["label"].cpu()  # waits for a GPU
        seconds = (time.perf_counter() - started) / count
    return seconds


def _repair_metadata(config: Config, run: Run, create: Callable[[Path], None]) -> None:
    """Write again what describes the arrays of a store, where it is lost or damaged; `create` makes
    an empty one in a folder."""
    folder = store_folder(config)
    if not folder.exists():
        return
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        create(fresh)
        if (folder / "zarr.json").is_file():
            with suppress(DamagedShardError):
                _check_same_settings(FeatureCache(folder), config, run)
        for name in FeatureCache.repair_metadata(folder, fresh):
            print(
                f"cache: {folder / name} was lost or damaged; it is written anew", file=sys.stderr
            )
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _create(
    config: Config,
    run: Run,
    net: nn.Module,
    num_slices: int,
    seed_cam: Mapping[str, Any],
    folder: Path,
) -> None:
    """The empty store, unless it is there."""
    if (folder / "zarr.json").exists():
        return
    bf16 = features_dtype(config.features, accelerator().device) is torch.bfloat16
    folder.parent.mkdir(parents=True, exist_ok=True)
    FeatureCache.create(
        folder,
        num_slices,
        row_shapes(net, config),
        slices_per_shard=config.cache.slices_per_shard,
        attributes={
            "settings": _settings(config),
            "inputs": run.input_ids(),
            "precision": "bf16" if bf16 else "fp32",
            "seed_cam": dict(seed_cam),
        },
    )


def _settings(config: Config) -> dict[str, Any]:
    """Those that decide what is in the cache, as JSON gives them back."""
    flat = flatten(config)
    found = {key: flat[key] for key in marked(Config, Mark.DECIDES_CACHE)}
    del found["features.precision"]  # the store says in which it was begun
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _check_same_settings(cache: FeatureCache, config: Config, run: Run) -> None:
    """Raise ValueError where the cache was begun with other settings or nets: a part of it that
    is made now would not fit."""
    before, now = dict(cache.attributes["settings"]), _settings(config)
    before["cache.slices_per_shard"] = cache.slices_per_shard
    now["cache.slices_per_shard"] = config.cache.slices_per_shard
    changed = [
        f"{key}={before.get(key)!r}, not {now[key]!r}" for key in now if before.get(key) != now[key]
    ]
    if cache.attributes["inputs"] != run.input_ids():
        changed.append("nets that have been trained again since")
    if changed:
        raise ValueError(
            f"{cache.folder} was begun with {'; '.join(changed[:3])}; restore the setting, or "
            f"delete {cache.folder.parent} and the folders of the stages after it"
        )


def _as_begun(config: Config, cache: FeatureCache) -> Config:
    """The settings with the precision and the seed map that the cache was begun with: parts of it
    that are made on other devices are made alike."""
    features = replace(config.features, precision=cache.attributes["precision"])
    config = replace(config, features=features)
    if config.seeds.cam == "auto":
        chosen = cache.attributes.get("seed_cam")
        if chosen is None:
            raise ValueError(
                f"{cache.folder} was begun by an earlier version, without a choice of the map that "
                f"makes seeds; delete {cache.folder} and run: cldf cache"
            )
        config = with_map(config, chosen["map"])
    return config


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return folder if folder.is_dir() else _existing(folder.absolute().parent)


def _check_keys(slices: Slices) -> None:
    for key in slices.keys:
        encoded_key(key)


def bytes_to_come(config: Config, slices: Slices) -> int:
    """What the slices that are not in the cache yet will take on the disk."""
    folder, done = store_folder(config), 0
    if (folder / "zarr.json").exists():
        cache = FeatureCache(folder)
        done = cache.num_done(range(cache.num_shards))
    with torch.device("meta"):
        net = build_unet(config.diffusion.net, len(datasets.channels(config.data)))
    size = bytes_per_slice(row_shapes(net, config))
    return size * (len(slices) - done)


def _check_space(config: Config, slices: Slices) -> None:
    """Raise ValueError where the slices that are still to be made do not fit on the disk."""
    folder, needed = store_folder(config), bytes_to_come(config, slices)
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:.2f} GB more, {folder.parent} has {free / 1e9:.2f} GB "
            "free; take fewer features.taps or features.timesteps, "
            "features.combine_timesteps=average, features.storage=int8, or another disk with "
            "runs=FOLDER"
        )
