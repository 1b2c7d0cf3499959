"""The agreement of CDM saliency with the slice labels of the validation patients.

No mask is read for it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cldf_dist.config import Config, Saliency, Segment
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.data.slices import body_mask
from cldf_dist.labels import SliceLabel
from cldf_dist.method.counterfactual import cdm_saliency
from cldf_dist.method.noise import Schedule
from cldf_dist.method.threshold import negative_threshold
from cldf_dist.method.weak_validation import area_fractions, weak_validation
from cldf_dist.system.distributed import accelerator, fail_on_all_ranks, gather_objects, processes
from cldf_dist.system.memory_format import fast_memory_format

# the defaults: a run's own settings of its methods may change without training anything again
SALIENCY = Saliency()
NEGATIVE_FRACTION = Segment().negative_fraction


def saliency_agreement(
    config: Config, table: SliceTable, diffusion: nn.Module, schedule: Schedule
) -> float | None:
    """The AUROC of the area above the threshold for the slice label, of the method `cdm`.

    Computed over `label_tuning.compared_slices` evenly spread slices of known label. The work is
    divided among the processes and all get the same number; None where the slices have one label
    only.
    """
    known = np.flatnonzero(table.labels >= 0)
    slice_indices = evenly_spread(known, config.label_tuning.compared_slices)
    mine = slice_indices[processes().rank :: processes().world_size]
    with fail_on_all_ranks():
        own = _saliency(config, table, mine, diffusion, schedule)
    found = chain.from_iterable(gather_objects(own))
    by_row = {slice_index: (score, inside) for slice_index, score, inside in found}
    labels = table.labels[slice_indices]
    if not {SliceLabel.NEGATIVE, SliceLabel.POSITIVE} <= set(labels.tolist()):
        return None
    scores = np.stack([by_row[slice_index][0] for slice_index in slice_indices.tolist()])
    body = np.stack([by_row[slice_index][1] for slice_index in slice_indices.tolist()])
    negative = labels == SliceLabel.NEGATIVE
    threshold = negative_threshold(scores[negative][body[negative]], NEGATIVE_FRACTION)
    agreement = weak_validation(area_fractions(scores, body, threshold), labels)["area_auroc"]
    return None if agreement is None else float(agreement)


def evenly_spread(slice_indices: npt.NDArray[np.intp], most: int) -> npt.NDArray[np.intp]:
    """At most `most` of these slice indices, evenly spread."""
    places = np.linspace(0, len(slice_indices) - 1, min(most, len(slice_indices))).round()
    return slice_indices[places.astype(np.intp)]


def saliency_of(
    net: nn.Module,
    schedule: Schedule,
    pixels: Float[Tensor, "batch channels height width"],
    keys: list[str],
) -> Float[Tensor, "batch height width"]:
    """CDM saliency of slices, by the default settings of the method `cdm`."""
    return cdm_saliency(
        net,
        schedule,
        pixels,
        keys,
        timesteps=SALIENCY.timesteps,
        num_noise_samples=SALIENCY.num_noise_samples,
        smooth_pixels=SALIENCY.smooth_pixels,
    )


def _saliency(
    config: Config,
    table: SliceTable,
    slice_indices: npt.NDArray[np.intp],
    diffusion: nn.Module,
    schedule: Schedule,
) -> list[tuple[int, Any, Any]]:
    """Index, saliency (height, width) and body mask (height, width) of each of these slices."""
    device = accelerator().device
    found: list[tuple[int, Any, Any]] = []
    for start in range(0, len(slice_indices), config.cache.batch_size):
        batch = slice_indices[start : start + config.cache.batch_size]
        images = table.read_images(batch)
        pixels = (
            torch.from_numpy(images).to(device).contiguous(memory_format=fast_memory_format(device))
        )
        saliency = saliency_of(
            diffusion, schedule, pixels, [table.keys[slice_index] for slice_index in batch]
        )
        found += zip(batch.tolist(), saliency.cpu().numpy(), body_mask(images), strict=True)
    return found
