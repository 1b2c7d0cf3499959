"""The choice of the class activation map for the seeds, and the check of the patch classifier.

In some trainings a map collapses, inverts or highlights pixels beside the object. Slice labels
cannot detect this, because the map is still high on the right slices. Agreement with another view
of the same slices can.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.config import CamMethod, Config
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.inference.patch_maps import patch_maps
from cldf_dist.inference.saliency_agreement import evenly_spread, saliency_of
from cldf_dist.labels import SliceLabel
from cldf_dist.method.agreement import correlations
from cldf_dist.method.cam import METHODS, class_activation_maps
from cldf_dist.system.distributed import (
    accelerator,
    broadcast_object,
    fail_on_all_ranks,
    gather_objects,
    processes,
)
from cldf_dist.system.files import DamagedShardError
from cldf_dist.system.memory_format import fast_memory_format

COMPARED_SLICES = 128  # positive training slices, at most
# where no map correlates this much with saliency, the gradient map is compared instead
LEAST_AGREEMENT = 0.2
FALLBACK = METHODS[0]  # where there is no positive training slice to compare
VIEWS = ("saliency", "gradient_map", "patch_logits")  # beside the activation maps

# {view: {method: mean correlation, None where it is not known}}
Agreement = dict[str, dict[str, float | None]]


def choose_seed_cam(
    config: Config, nets: FrozenNets, table: SliceTable, store: Path
) -> dict[str, Any]:
    """The chosen "map", the view "judged_by" and the "agreement", for the store's attributes.

    The same on all processes: as the store was created, else by the agreement of the nets.
    """
    with fail_on_all_ranks():
        before = _chosen_before(store) if processes().is_main else None
    before = broadcast_object(before)
    if before is not None:
        return dict(before)
    agreement = map_agreement(config, nets, table)
    method: str = config.seeds.cam
    view = "seeds.cam"
    if method == "auto":
        method, view = best_map(agreement)
        if processes().is_main:
            words = ", ".join(f"{name} {_shown(r)}" for name, r in agreement[view].items())
            print(f"cache: agreement with {view}: {words}; seeds: {method}", file=sys.stderr)
    return {"map": method, "judged_by": view, "agreement": agreement}


def patch_logit_agreement(seed_cam: Mapping[str, Any]) -> float | None:
    """The mean correlation of patch logits and seed map; None where it is not known."""
    agreement = seed_cam.get("agreement", {}).get("patch_logits", {})
    found: float | None = agreement.get(seed_cam.get("map"))
    return found


def _chosen_before(store: Path) -> dict[str, Any] | None:
    if not (store / "zarr.json").is_file():
        return None
    try:
        return FeatureCache(store).attributes.get("seed_cam")
    except DamagedShardError:  # reported or repaired by whoever opens the store next
        return None


def with_map(config: Config, method: str) -> Config:
    """The settings with `seeds.cam` set to `method`."""
    return replace(config, seeds=replace(config.seeds, cam=cast(CamMethod, method)))


def map_agreement(config: Config, nets: FrozenNets, table: SliceTable) -> Agreement:
    """The mean correlation of each activation map with each other view, within the body.

    Computed on at most `COMPARED_SLICES` positive slices of the table. Saliency is computed where
    `seeds.cam=auto` needs it and the diffusion model has labels, patch logits where there is a
    patch classifier.
    """
    slice_indices = evenly_spread(
        np.flatnonzero(table.labels == SliceLabel.POSITIVE), COMPARED_SLICES
    )
    size = config.cache.batch_size
    batches = [slice_indices[start : start + size] for start in range(0, len(slice_indices), size)]
    # whole batches to each process, so that the digits do not depend on the number of processes
    with fail_on_all_ranks():
        own = [
            (number, _correlations(config, nets, table, batches[number]))
            for number in range(processes().rank, len(batches), processes().world_size)
        ]
    parts = dict(chain.from_iterable(gather_objects(own)))
    joined = {view: [line for n in sorted(parts) for line in parts[n][view]] for view in VIEWS}
    return {view: dict(zip(METHODS, _means(lines), strict=True)) for view, lines in joined.items()}


def _correlations(
    config: Config, nets: FrozenNets, table: SliceTable, slice_indices: npt.NDArray[np.intp]
) -> dict[str, list[list[float]]]:
    """Correlations of a batch by view: for each slice, one for each of `METHODS`."""
    device = accelerator().device
    images = table.read_images(slice_indices)
    inside = torch.from_numpy(body_mask(images)).to(device)
    pixels = (
        torch.from_numpy(images).to(device).contiguous(memory_format=fast_memory_format(device))
    )
    keys = [table.keys[slice_index] for slice_index in slice_indices]
    views = {"gradient_map": gradient_map_of(config, nets, pixels, keys)[0]}
    if config.seeds.cam == "auto" and config.diffusion.label_dropout < 1:
        views["saliency"] = saliency_of(nets.diffusion, nets.schedule, pixels, keys)
    if nets.patch_classifier is not None:
        views["patch_logits"] = patch_maps(
            nets.patch_classifier, pixels, inside
        ).patch_logits.sigmoid()
    maps = class_activation_maps(nets.cam, pixels, config.cam.layer, METHODS)
    found: dict[str, list[list[float]]] = {view: [] for view in VIEWS}
    for view, values in views.items():
        each = [correlations(maps[method], values, inside) for method in METHODS]
        found[view] = torch.stack(each, dim=1).tolist()
    return found


def _means(lines: list[list[float]]) -> list[float | None]:
    """The mean over slices for each of `METHODS`; slices without a body are left out."""
    if not lines or np.isnan(lines).all():
        return [None] * len(METHODS)
    return [float(mean) for mean in np.nanmean(lines, axis=0)]


def best_map(agreement: Agreement) -> tuple[str, str]:
    """The map that agrees best with saliency, and "saliency".

    Where no map reaches `LEAST_AGREEMENT`, the one that agrees best with the gradient map, and
    "gradient_map". The first of equals; `FALLBACK` where nothing is known.
    """
    for view, least in (("saliency", LEAST_AGREEMENT), ("gradient_map", -1.0)):
        known = {method: r for method, r in agreement[view].items() if r is not None and r >= least}
        if known:
            return max(known, key=lambda method: known[method]), view
    return FALLBACK, "gradient_map"


def _shown(agreement: float | None) -> str:
    return "unknown" if agreement is None else f"{agreement:.3f}"
