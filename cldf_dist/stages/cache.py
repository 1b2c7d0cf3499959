"""Diffusion features, gradient maps, CAMs and seeds of training and validation slices, once.

Each process owns a contiguous run of cache shards and is their only writer; shards that are done
are not made again. The same functions serve `segment`, where the maps are computed on the fly.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cldf_dist.config import Config
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.cache_parts import (
    part_of,
    repair,
    shards_of_this_rank,
    shared_stage,
    store_folder,
)  # fmt: skip
from cldf_dist.inference.feature_extraction import (
    Slices,
    bytes_per_slice,
    cached_slices,
    compute_batch,
    compute_shard,
    slice_shapes,
)
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.run_store import (
    as_begun,
    check_count,
    check_keys,
    check_same_settings,
    check_same_slices,
    create_run_store,
    repair_store,
)
from cldf_dist.inference.seed_cam import FALLBACK, choose_seed_cam, with_map
from cldf_dist.inference.seed_sources import SeedLabels, seed_report
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator, fail_on_all_ranks, processes
from cldf_dist.system.progress import progress
from cldf_dist.training.on_slices import shard_set
from cldf_dist.training.time_estimate import in_words

TIMED_SLICES = 4


def execute(config: Config, run: Run) -> dict[str, Any]:
    """The whole cache, or with `cache.part` one job's part of it, or with `cache.verify` a look
    for damage first."""
    slices = cached_slices(shard_set(config, run))
    nets = FrozenNets.load(config, run)
    with ExitStack() as held:
        with fail_on_all_ranks():
            if run.is_main and config.cache.part:
                held.enter_context(shared_stage(config))
            if run.is_main:
                check_keys(slices)
        seed_cam = choose_seed_cam(config, nets, slices.tables[0], store_folder(config))
        with fail_on_all_ranks():
            if run.is_main:
                empty = partial(
                    create_run_store, config, run, nets.diffusion, len(slices), seed_cam
                )
                if config.cache.verify:
                    repair_store(config, run, empty)
                _check_space(config, slices)
                empty(store_folder(config))
        with fail_on_all_ranks():
            cache = FeatureCache(store_folder(config))
            check_same_settings(cache, config, run)
            check_count(cache, slices)
        config = as_begun(config, cache)
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
    num_slices = sum(len(cache.slices_of(shard)) for shard in scope)
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
    total = sum(len(cache.slices_of(shard)) for shard in scope)
    main = processes().is_main
    with progress("cache", total, "slices", shown=main) as bar:
        bar.start_at(cache.num_done(scope))
        # writing waits for the disk: the next shard is computed meanwhile
        with fail_on_all_ranks(), ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for shard in mine:
                if cache.is_done(shard):
                    continue
                keys, values = compute_shard(config, nets, slices, cache.slices_of(shard))
                if writing is not None:
                    writing.result()
                writing = writer.submit(cache.write_shard, shard, keys, values)
                if main and bar.is_due():
                    bar.advance(cache.num_done(scope) - bar.done)
            if writing is not None:
                writing.result()
        if main:
            bar.advance(cache.num_done(scope) - bar.done)


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """Bytes and time, as `--dry-run` prints them before anything is computed."""
    num_channels = len(datasets.channels(config.data))
    nets = FrozenNets.untrained(config, num_channels)
    shapes = slice_shapes(nets.diffusion, config)
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
        batch = compute_batch(config, nets, images.astype(np.float32), keys, labels)
        batch["label"].cpu()  # waits for a GPU
        seconds = (time.perf_counter() - started) / count
    return seconds


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return folder if folder.is_dir() else _existing(folder.absolute().parent)


def bytes_to_come(config: Config, slices: Slices) -> int:
    """The bytes on the disk of the slices that are not in the cache yet."""
    folder, done = store_folder(config), 0
    if (folder / "zarr.json").exists():
        cache = FeatureCache(folder)
        done = cache.num_done(range(cache.num_shards))
    with torch.device("meta"):
        net = build_unet(config.diffusion.net, len(datasets.channels(config.data)))
    size = bytes_per_slice(slice_shapes(net, config))
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
