"""The feature store of a run: created once, refused where settings, nets or slices differ."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cldf_dist.config import Config, Mark, flatten, marked
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.features.store_creation import encoded_key, repair_metadata
from cldf_dist.inference.cache_parts import store_folder
from cldf_dist.inference.feature_extraction import Slices, slice_shapes
from cldf_dist.inference.seed_cam import with_map
from cldf_dist.method.features import features_dtype
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import accelerator
from cldf_dist.system.files import DamagedShardError


def repair_store(config: Config, run: Run, create: Callable[[Path], None]) -> None:
    """Restore lost or damaged metadata of a store's arrays.

    `create` creates an empty store in a folder, from which the metadata is copied.
    """
    folder = store_folder(config)
    if not folder.exists():
        return
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        create(fresh)
        if (folder / "zarr.json").is_file():
            with suppress(DamagedShardError):
                check_same_settings(FeatureCache(folder), config, run)
        for name in repair_metadata(folder, fresh):
            print(f"cache: {folder / name} was lost or damaged; it is restored", file=sys.stderr)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def create_run_store(
    config: Config,
    run: Run,
    net: nn.Module,
    num_slices: int,
    seed_cam: Mapping[str, Any],
    folder: Path,
) -> None:
    """Create the empty store in `folder`, unless it exists."""
    if (folder / "zarr.json").exists():
        return
    bf16 = features_dtype(config.features, accelerator().device) is torch.bfloat16
    folder.parent.mkdir(parents=True, exist_ok=True)
    FeatureCache.create(
        folder,
        num_slices,
        slice_shapes(net, config),
        slices_per_shard=config.cache.slices_per_shard,
        attributes={
            "settings": _settings(config),
            "inputs": run.input_ids(),
            "precision": "bf16" if bf16 else "fp32",
            "seed_cam": dict(seed_cam),
        },
    )


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide the content of the cache, as JSON types."""
    flat = flatten(config)
    found = {key: flat[key] for key in marked(Config, Mark.DECIDES_CACHE)}
    del found["features.precision"]  # the store says in which it was begun
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def check_same_settings(cache: FeatureCache, config: Config, run: Run) -> None:
    """Raise ValueError where the cache was created with other settings or nets.

    What is computed now would not fit the rest of it.
    """
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


def as_begun(config: Config, cache: FeatureCache) -> Config:
    """The settings with the precision and the seed map with which the cache was created.

    So parts of it that are computed on other devices are computed alike.
    """
    features = replace(config.features, precision=cache.attributes["precision"])
    config = replace(config, features=features)
    if config.seeds.cam == "auto":
        chosen = cache.attributes["seed_cam"]
        config = with_map(config, chosen["map"])
    return config


def check_same_slices(cache: FeatureCache, slices: Slices) -> None:
    """Raise ValueError unless the cache holds, or will hold, these slices in this order."""
    check_count(cache, slices)
    if any(stored not in ("", key) for stored, key in zip(cache.keys, slices.keys)):
        raise _other_slices(cache)


def check_count(cache: FeatureCache, slices: Slices) -> None:
    """Raise ValueError unless the cache has as many slices."""
    if len(cache) != len(slices):
        raise _other_slices(cache)


def _other_slices(cache: FeatureCache) -> ValueError:
    return ValueError(
        f"{cache.folder} was made for other slices than those prepared now (damaged slices "
        "that data.on_damaged=skip drops change the list); delete the cache stage's folder and "
        "run it again"
    )


def check_keys(slices: Slices) -> None:
    """Raise ValueError for a slice whose key is too long to be stored."""
    for key in slices.keys:
        encoded_key(key)
