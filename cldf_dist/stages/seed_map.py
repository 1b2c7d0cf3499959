"""Which class activation map makes the seeds, where `seeds.cam=auto` leaves it to the data.

A map can collapse or turn inside out with the training that it is read from, and slice labels
cannot say so: it lights up on the right slices all the same. Another view of the same slices can.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.config import Config
from cldf_dist.data.cache import FeatureCache
from cldf_dist.data.mapped_shard import DamagedShardError
from cldf_dist.data.shards import SliceTable
from cldf_dist.data.slices import OBJECT, foreground
from cldf_dist.layout import fast_layout
from cldf_dist.method.agreement import correlations
from cldf_dist.method.cam import METHODS, class_activation_maps
from cldf_dist.processes import accelerator, from_all, from_main, processes, together
from cldf_dist.stages.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.stages.label_agreement import evenly_spread, saliency_of

COMPARED_SLICES = 128  # positive training slices, at most
FALLBACK = METHODS[0]  # where no positive training slice can tell


def choose_seed_map(
    config: Config, nets: FrozenNets, table: SliceTable, store: Path
) -> dict[str, Any] | None:
    """{"map", "agreement"} for the attributes of the store, the same on all processes: as it was
    begun, else by what the nets say; None unless `seeds.cam=auto`."""
    if config.seeds.cam != "auto":
        return None
    with together():
        before = _chosen_before(store) if processes().is_main else None
    before = from_main(before)
    if before is not None:
        return dict(before)
    agreement = map_agreement(config, nets, table)
    method = best_map(agreement)
    if processes().is_main:
        words = ", ".join(f"{name} {_shown(value)}" for name, value in agreement.items())
        print(
            f"cache: agreement of the CAMs with the CDM: {words}; seeds: {method}", file=sys.stderr
        )
    return {"map": method, "agreement": agreement}


def _chosen_before(store: Path) -> dict[str, Any] | None:
    if not (store / "zarr.json").is_file():
        return None
    try:
        return FeatureCache(store, quiet=True).attributes.get("seed_map")
    except DamagedShardError:  # said, or mended, by whoever opens the store next
        return None


def with_map(config: Config, method: str) -> Config:
    return replace(config, seeds=replace(config.seeds, cam=method))


def map_agreement(config: Config, nets: FrozenNets, table: SliceTable) -> dict[str, float | None]:
    """The mean correlation of each activation map with CDM saliency over the subject, on at most
    `COMPARED_SLICES` positive slices of the table; None where there is no such slice.

    A diffusion model that never saw a label has no saliency: then with the gradient map.
    """
    rows = evenly_spread(np.flatnonzero(table.labels == OBJECT), COMPARED_SLICES)
    size = config.cache.batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    # whole batches to each process: with any number of them the same digits
    with together():
        own = [
            (number, _correlations(config, nets, table, batches[number]))
            for number in range(processes().rank, len(batches), processes().world_size)
        ]
    found = dict(chain.from_iterable(from_all(own)))
    joined = np.array([line for number in sorted(found) for line in found[number]])
    if not len(joined) or np.isnan(joined).all():
        return dict.fromkeys(METHODS)
    return dict(zip(METHODS, np.nanmean(joined, axis=0).tolist(), strict=True))


def _correlations(
    config: Config, nets: FrozenNets, table: SliceTable, rows: npt.NDArray[np.intp]
) -> list[list[float]]:
    """Of a batch of slices, for each of them and each of `METHODS`."""
    device = accelerator().device
    images = table.read_images(rows)
    inside = torch.from_numpy(foreground(images)).to(device)
    pixels = torch.from_numpy(images).to(device).contiguous(memory_format=fast_layout(device))
    keys = [table.keys[row] for row in rows]
    if config.diffusion.label_dropout == 1:
        witness, _ = gradient_map_of(config, nets, pixels, keys)
    else:
        witness = saliency_of(nets.diffusion, nets.schedule, pixels, keys)
    maps = class_activation_maps(nets.cam, pixels, config.cam.layer, METHODS)
    found = [correlations(maps[method], witness, inside) for method in METHODS]
    lines: list[list[float]] = torch.stack(found, dim=1).tolist()
    return lines


def best_map(agreement: Mapping[str, float | None]) -> str:
    """The map with the highest agreement; the first of equals, and where nothing is known."""
    known = {method: value for method, value in agreement.items() if value is not None}
    return max(known, key=lambda method: known[method]) if known else FALLBACK


def _shown(agreement: float | None) -> str:
    return "unknown" if agreement is None else f"{agreement:.3f}"
