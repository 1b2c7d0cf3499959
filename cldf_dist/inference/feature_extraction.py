"""The arrays of the feature store: features, maps and seeds of slices, computed by frozen nets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from cldf_dist.config import Config
from cldf_dist.data.features.encoding import to_stored
from cldf_dist.data.features.store import SCALE
from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.inference.patch_maps import PATCH_LOGITS, PATCH_TAP, patch_maps
from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.features import extract_features, features_dtype, tap_shapes
from cldf_dist.method.seeds import seed_labels
from cldf_dist.system.distributed import accelerator
from cldf_dist.system.memory_format import fast_memory_format

CACHED_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Slices:
    """Prepared slices of training and validation patients, as one numbered list."""

    tables: tuple[SliceTable, ...]

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables)

    def place(self, slice_index: int) -> tuple[SliceTable, int]:
        """The table of a slice, and the slice's index in it; raises IndexError beyond all."""
        for table in self.tables:
            if slice_index < len(table):
                return table, slice_index
            slice_index -= len(table)
        raise IndexError(slice_index)

    @property
    def keys(self) -> list[str]:
        """The keys of all slices, in order."""
        return [key for table in self.tables for key in table.keys]


def cached_slices(shards: ShardSet) -> Slices:
    """The slices of the cache, in its order."""
    return Slices(tuple(shards.split(name) for name in CACHED_SPLITS))


def compute_shard(
    config: Config, nets: FrozenNets, slices: Slices, slice_indices: range
) -> tuple[list[str], dict[str, Any]]:
    """Keys and arrays by name of the slices with these indices; batches never cross a shard."""
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    for start in range(slice_indices.start, slice_indices.stop, config.cache.batch_size):
        batch = range(start, min(start + config.cache.batch_size, slice_indices.stop))
        placed = [slices.place(slice_index) for slice_index in batch]
        images = np.stack([table.read_image(slice_index) for table, slice_index in placed])
        batch_keys = [table.keys[slice_index] for table, slice_index in placed]
        labels = torch.tensor([int(table.labels[slice_index]) for table, slice_index in placed])
        parts.append(compute_batch(config, nets, images, batch_keys, labels))
        keys += batch_keys
    return keys, {
        name: torch.cat([part[name].cpu() for part in parts]).numpy() for name in parts[0]
    }


def compute_batch(
    config: Config, nets: FrozenNets, images: Any, keys: list[str], labels: Int[Tensor, " batch"]
) -> dict[str, Tensor]:
    """The arrays of a batch by name; `images` (batch, channels, height, width) are prepared."""
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


def slice_shapes(net: nn.Module, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
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
    """The stored bytes of one slice with arrays of these `slice_shapes`."""
    return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes.values())
