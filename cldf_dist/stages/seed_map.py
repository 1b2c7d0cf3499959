"""Which class activation map makes the seeds, where `seeds.cam=auto` leaves it to the data.

A map can collapse or turn inside out with the training that it is read from, and slice labels
cannot say so: it lights up on the right slices all the same. Another view of the same slices can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cldf_dist.config import Config
from cldf_dist.data.shards import SliceTable
from cldf_dist.data.slices import OBJECT, foreground
from cldf_dist.layout import fast_layout
from cldf_dist.method.agreement import correlations
from cldf_dist.method.cam import METHODS, class_activation_maps
from cldf_dist.processes import accelerator, from_all, from_main, processes, together
from cldf_dist.run import Run, write_atomically
from cldf_dist.stages.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.stages.label_agreement import evenly_spread, saliency_of

FILE = "seed_map.json"
COMPARED_SLICES = 128  # positive training slices, at most
FALLBACK = METHODS[0]  # where no positive training slice can tell, or none was asked


def with_seed_map(config: Config, run: Run, nets: FrozenNets, table: SliceTable) -> Config:
    """The settings with a map in place of "auto": the one that agrees best with the diffusion
    model's saliency on positive training slices. All processes, and jobs that make parts of one
    cache, take the same."""
    if config.seeds.cam != "auto":
        return config
    path, inputs = run.folder / FILE, run.input_ids()
    with together():
        found = _read(path, inputs) if run.is_main else None
    found = from_main(found)
    if found is None:
        agreement = map_agreement(config, nets, table)
        with together():
            found = _write_first(path, inputs, agreement) if run.is_main else None
        found = from_main(found)
    return with_map(config, found)


def chosen_seed_map(config: Config, cache_folder: Path) -> Config:
    """The settings with the map that the cache in this folder was made with."""
    if config.seeds.cam != "auto":
        return config
    path = cache_folder / FILE
    if not path.exists():
        return with_map(config, FALLBACK)
    return with_map(config, json.loads(path.read_text())["map"])


def with_map(config: Config, method: str) -> Config:
    return replace(config, seeds=replace(config.seeds, cam=method))


def map_agreement(config: Config, nets: FrozenNets, table: SliceTable) -> dict[str, float | None]:
    """The mean correlation of each activation map with CDM saliency over the subject, on at most
    `COMPARED_SLICES` positive slices of the table; None where there is no such slice.

    A diffusion model that never saw a label has no saliency: then with the gradient map.
    """
    rows = evenly_spread(np.flatnonzero(table.labels == OBJECT), COMPARED_SLICES)
    mine = rows[processes().rank :: processes().world_size]
    with together():
        own = _correlations(config, nets, table, mine)
    found: dict[str, float | None] = {}
    for method in METHODS:
        parts = [part for share in from_all(own) for part in share[method]]
        found[method] = float(np.nanmean(parts)) if not np.all(np.isnan(parts)) else None
    return found


def _correlations(
    config: Config, nets: FrozenNets, table: SliceTable, rows: npt.NDArray[np.intp]
) -> dict[str, list[float]]:
    device = accelerator().device
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for start in range(0, len(rows), config.cache.batch_size):
        batch = rows[start : start + config.cache.batch_size]
        images = table.read_images(batch)
        inside = torch.from_numpy(foreground(images)).to(device)
        pixels = torch.from_numpy(images).to(device).contiguous(memory_format=fast_layout(device))
        keys = [table.keys[row] for row in batch]
        if config.diffusion.label_dropout == 1:
            witness, _ = gradient_map_of(config, nets, pixels, keys)
        else:
            witness = saliency_of(nets.diffusion, nets.schedule, pixels, keys)
        maps = class_activation_maps(nets.cam, pixels, config.cam.layer, METHODS)
        for method in METHODS:
            found[method] += correlations(maps[method], witness, inside).tolist()
    return found


def best_map(agreement: Mapping[str, float | None]) -> str:
    """The map with the highest agreement; the first of equals, and where nothing is known."""
    known = {method: value for method, value in agreement.items() if value is not None}
    return max(known, key=lambda method: known[method]) if known else FALLBACK


def _read(path: Path, inputs: Mapping[str, str]) -> str | None:
    """The map that was chosen before, for the same nets."""
    if not path.exists():
        return None
    before = json.loads(path.read_text())
    return str(before["map"]) if before["inputs"] == inputs else None


def _write_first(
    path: Path, inputs: Mapping[str, str], agreement: Mapping[str, float | None]
) -> str:
    """Keep the choice; the one of a job that was quicker, where there is one."""
    before = _read(path, inputs)
    if before is not None:
        return before
    method = best_map(agreement)
    about = {"map": method, "agreement": dict(agreement), "inputs": inputs}
    write_atomically(path, json.dumps(about, indent=1))
    words = ", ".join(f"{name} {_shown(value)}" for name, value in agreement.items())
    print(f"cache: agreement of the CAMs with the CDM: {words}; seeds: {method}", file=sys.stderr)
    return method


def _shown(agreement: float | None) -> str:
    return "unknown" if agreement is None else f"{agreement:.3f}"
