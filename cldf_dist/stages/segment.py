"""Score maps and masks of the test patients, for CLDF and every baseline.

The threshold of each method is set without masks: it is the score that a fixed fraction of the body
pixels of negative validation slices exceeds. Gate, grid and post-processing are the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Config
from cldf_dist.data.formats.nifti import write_nifti
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import Geometry
from cldf_dist.inference.segmenter import Segmenter
from cldf_dist.labels import SliceLabel
from cldf_dist.method.threshold import negative_threshold
from cldf_dist.methods import Role, names_of
from cldf_dist.runs.run import Run, read_json, write_atomically
from cldf_dist.scoring.masks import (
    FloatArray,
    PatientScores,
    mask_and_probability,
    write_own_layout,
)
from cldf_dist.scoring.weak_validation import weak_validation_of_methods
from cldf_dist.system.distributed import broadcast_object, processes, wait_for_everyone
from cldf_dist.system.files import remove_leftovers
from cldf_dist.system.progress import progress
from cldf_dist.training.on_slices import shard_set


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Score validation and test patients, set the thresholds, write the masks of test patients.

    Returns what to keep with DONE. Patients whose scores are there are not scored again.
    """
    shards = shard_set(config, run)
    if run.is_main:
        remove_leftovers(run.folder)
    wait_for_everyone()
    segmenter = Segmenter.load(config, run)
    _check_mask_method(config, segmenter.methods)
    folder = run.folder / "scores"
    folder.mkdir(exist_ok=True)
    patients = [*shards.patients["validation"], *shards.patients["test"]]
    # one look for all processes: files appear while the others still look
    missing = broadcast_object([name for name in patients if not (folder / f"{name}.npz").exists()])
    mine = patients_of_this_rank({name: len(shards.geometry(name).indices) for name in missing})
    with progress("segment", len(mine), "patients", shown=run.is_main) as bar:
        for name in mine:
            keys, images, places = _slices_of(shards, name)
            scores = segmenter.score(name, keys, images)
            scores.spread(places, len(shards.geometry(name).indices)).save(folder)
            bar.advance(note=name)
    wait_for_everyone()
    if run.is_main:
        rule = _thresholds_without_masks(config, shards, folder, segmenter.methods)
        rule["mask_method"] = _mask_method(config, shards, folder, rule["thresholds"])
        write_atomically(run.folder / "thresholds.json", json.dumps(rule, indent=1))
    wait_for_everyone()
    rule = read_json(run.folder / "thresholds.json")
    for name in shards.patients["test"][processes().rank :: processes().world_size]:
        scores = PatientScores.load(folder, name)
        _write_masks(config, scores, shards.geometry(name), rule, run.folder)
    wait_for_everyone()
    return {"methods": list(segmenter.methods), "patients": len(patients)}


def patients_of_this_rank(num_slices: Mapping[str, int]) -> list[str]:
    """The patients of this process, by their slices: the largest first, each to the process that
    has the fewest slices so far."""
    shares: list[list[str]] = [[] for _ in range(processes().world_size)]
    totals = [0] * len(shares)
    for name in sorted(num_slices, key=lambda name: -num_slices[name]):
        rank = totals.index(min(totals))
        shares[rank].append(name)
        totals[rank] += num_slices[name]
    return shares[processes().rank]


def _slices_of(shards: ShardSet, patient: str) -> tuple[list[str], FloatArray, list[int]]:
    """Keys and images of a patient's slices, and their places among all that were prepared."""
    prepared = list(shards.geometry(patient).indices)
    for split in ("validation", "test"):
        table = shards.split(split)
        mine = [number for number, name in enumerate(table.patients) if name == patient]
        if mine:
            places = [prepared.index(int(table.indices[number])) for number in mine]
            return [table.keys[number] for number in mine], table.read_images(mine), places
    raise ValueError(f"{patient} has no prepared slices")


def _thresholds_without_masks(
    config: Config, shards: ShardSet, folder: Path, methods: tuple[str, ...]
) -> dict[str, Any]:
    """The headline rule: for each method the threshold that `segment.negative_fraction` of the
    body pixels of negative validation slices exceed. It uses image-level labels only."""
    fraction = config.segment.negative_fraction
    table = shards.split("validation")
    pools: dict[str, list[npt.NDArray[np.float32]]] = {method: [] for method in methods}
    for patient in shards.patients["validation"]:
        scores = PatientScores.load(folder, patient)
        mine = [name == patient for name in table.patients]
        negatives = table.indices[mine][table.labels[mine] == SliceLabel.NEGATIVE]
        negative = np.isin(shards.geometry(patient).indices, negatives)
        for method in methods:
            pools[method].append(scores.scores[method][negative][scores.body_mask[negative]])
    thresholds = {
        method: negative_threshold(np.concatenate(pool), fraction) for method, pool in pools.items()
    }
    return {"rule": "negatives", "negative_fraction": fraction, "thresholds": thresholds}


def _check_mask_method(config: Config, methods: Sequence[str]) -> None:
    """Raise ValueError, before any patient is scored, where the method was left out in training."""
    chosen, ours = (
        config.segment.mask_method,
        [name for name in names_of(Role.OURS) if name in methods],
    )
    if chosen not in ("auto", *ours):
        raise ValueError(
            f"segment.mask_method={chosen} is no method of this run, which has {', '.join(ours)}: "
            "it was left out in train-decoder; take another or auto"
        )


def _mask_method(
    config: Config, shards: ShardSet, folder: Path, thresholds: Mapping[str, float]
) -> str:
    """The method whose masks new scans get: as set, or the best of ours by weak validation, the
    first of equals."""
    if config.segment.mask_method != "auto":
        return config.segment.mask_method
    ours = {name: thresholds[name] for name in names_of(Role.OURS) if name in thresholds}
    weak = weak_validation_of_methods(shards, folder, ours)
    return max(ours, key=lambda name: weak[name]["area_auroc"] or 0.0)


def _write_masks(
    config: Config, scores: PatientScores, geometry: Geometry, rule: dict[str, Any], folder: Path
) -> None:
    affine = np.array(geometry.affine)
    for method, threshold in rule["thresholds"].items():
        mask, probability = mask_and_probability(config, scores, method, geometry, threshold)
        target = folder / "masks" / method
        target.mkdir(parents=True, exist_ok=True)
        write_nifti(target / f"{scores.patient}.nii.gz", mask, affine)
        write_own_layout(folder / "chaos" / method, mask, geometry, config.data)
        if method == rule["mask_method"]:
            (folder / "probability").mkdir(exist_ok=True)
            path = folder / "probability" / f"{scores.patient}.nii.gz"
            write_nifti(path, probability, affine)
