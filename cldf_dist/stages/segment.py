"""Score maps and masks of the test patients, for CLDF and every baseline.

The threshold of each row is set without masks: it is the score that a fixed share of the subject
pixels of negative validation slices exceeds. Gate, grid and post-processing are the same for all
rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.data.features.encoding import as_stored
from cldf_dist.data.formats.nifti import write_nifti
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import Geometry, body_mask
from cldf_dist.inference.frozen_nets import FrozenNets, gradient_map_of
from cldf_dist.inference.loading import load_decoder, shard_set
from cldf_dist.inference.patch_logits import PATCH_TAP, PatchMaps, patch_maps
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.counterfactual import cdm_saliency, cg_cdm, cg_diff
from cldf_dist.method.features import extract_features, features_dtype
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.method.seeds import scale_to_unit
from cldf_dist.method.threshold import negative_threshold
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.runs.run import Run, read_json, write_atomically
from cldf_dist.scoring.masks import (
    CONTROLS,
    METHODS,
    OURS,
    PLUS,
    UPPER_BOUNDS,
    FloatArray,
    PatientScores,
    mask_and_probability,
    smoothed_over_slices,
    write_own_layout,
)
from cldf_dist.scoring.weak_validation import weak_validation_of_methods
from cldf_dist.system.distributed import accelerator, broadcast_object, processes, wait_for_everyone
from cldf_dist.system.files import remove_leftovers
from cldf_dist.system.memory_format import fast_memory_format
from cldf_dist.system.progress import progress
from cldf_dist.training.export import read_description

CAMS = ("gradcam", "gradcam_pp", "layercam")


@dataclass(frozen=True)
class Segmenter:
    """All trained nets of a run; makes the score maps of a patient's slices."""

    config: Config
    nets: FrozenNets
    decoders: dict[str, tuple[PixelDecoder, Tensor]]  # row -> decoder and prototypes

    @classmethod
    def load(cls, config: Config, run: Run) -> Segmenter:
        folder = run.needs("train-decoder")
        decoders = {"cldf": load_decoder(folder)}
        for row in (PLUS, *CONTROLS, *UPPER_BOUNDS):
            if (folder / row / "DONE").exists():
                decoders[row] = load_decoder(folder / row)
        # new scans are seen as the training slices were, on whatever device
        precision = read_description(folder)["features_precision"]
        features = replace(config.features, precision=precision)
        return cls(replace(config, features=features), FrozenNets.load(config, run), decoders)

    @property
    def rows(self) -> tuple[str, ...]:
        """Every row that the settings have and ask for, and whose nets are there."""
        config = self.config
        there = {
            **{row: row in self.decoders for row in (PLUS, *CONTROLS, *UPPER_BOUNDS)},
            "cg_diff": config.cg_diff.enabled,
            "cg_cdm": config.cg_cdm.enabled,
            "patch_classifier": config.patch_classifier.enabled,
        }
        rows = (*METHODS, *CONTROLS, *UPPER_BOUNDS)
        asked = config.segment.methods or rows
        return tuple(row for row in rows if row in asked and there.get(row, True))

    def score(
        self,
        patient: str,
        keys: list[str],
        images: FloatArray,
        rows: Sequence[str] | None = None,
    ) -> PatientScores:
        """Score maps of prepared slices (slices, channels, height, width), of `rows` or all."""
        wanted = self.rows if rows is None else rows
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(keys), self.config.segment.batch_size):
            batch = slice(start, start + self.config.segment.batch_size)
            scores = self._score_batch(images[batch], keys[batch], wanted)
            parts.append({name: part.cpu() for name, part in scores.items()})
        joined = {n: torch.cat([p.pop(n) for p in parts]).numpy() for n in list(parts[0])}
        probability = smoothed_over_slices(joined.pop("probability"))
        return PatientScores(patient, joined, probability, body_mask(images))

    def _score_batch(
        self, images: FloatArray, keys: list[str], rows: Sequence[str]
    ) -> dict[str, Tensor]:
        """The score map of each row, and "probability", which gates them all: p(object), the mean
        of what the classifiers of the run say."""
        config, nets = self.config, self.nets
        device = accelerator().device
        inside = torch.from_numpy(body_mask(images)).to(device)
        pixels = (
            torch.from_numpy(images).to(device).contiguous(memory_format=fast_memory_format(device))
        )
        maps, verdict = gradient_map_of(config, nets, pixels, keys)
        verdicts = [verdict, slice_probability(nets.cam, pixels)]
        scaled = {"gradient_map": maps}
        cams = [row for row in CAMS if row in rows]
        if cams:
            scaled |= class_activation_maps(nets.cam, pixels, config.cam.layer, cams)
        patches = None
        if nets.patch_classifier is not None:
            patches = patch_maps(nets.patch_classifier, pixels, inside)
            verdicts.append(slice_probability(nets.patch_classifier, pixels))
        probability = torch.stack(verdicts).mean(0)
        # a map scaled within its slice says where, p(object) says whether: only the product
        # can be compared with one threshold across slices
        sure = probability[:, None, None]
        scores = {
            row: scale_to_unit(scaled[row], inside) * sure
            for row in (*CAMS, "gradient_map")
            if row in rows
        }
        scores |= _counterfactuals(config, nets, pixels, keys, rows)
        if patches is not None:
            scores["patch_classifier"] = patches.patch_logits.sigmoid()
        decoded = [row for row in self.decoders if row in rows]
        scores |= self._decoded(pixels, keys, decoded, patches)
        return {
            **{row: scores[row].float() for row in rows},
            "probability": probability,
        }

    @torch.no_grad()
    def _decoded(
        self, pixels: Tensor, keys: list[str], rows: Sequence[str], patches: PatchMaps | None
    ) -> dict[str, Tensor]:
        """The score maps of the decoders, from features that are extracted once for all."""
        if not rows:
            return {}
        taps = self.decoder_taps(pixels, keys, patches)
        size, num_pixels = pixels.shape[2:], self.config.segment.tile_pixels
        return {
            row: score_maps(*self.decoders[row], taps, size, tile_pixels=num_pixels) for row in rows
        }

    @torch.no_grad()
    def decoder_taps(
        self, pixels: Tensor, keys: Sequence[str], patches: PatchMaps | None = None
    ) -> dict[str, Tensor]:
        """{tap: (batch, channels, h, w)} of prepared slices (batch, channels, height, width), with
        the values that the decoders were trained on: rounded as in the cache."""
        nets, settings = self.nets, self.config.features
        dtype = features_dtype(settings, pixels.device)
        features = extract_features(
            nets.diffusion, nets.schedule, pixels, keys, settings, dtype, nets.cam
        )
        if patches is not None and self.config.plus.patch_tap:
            features[PATCH_TAP] = patches.activations
        return {tap: as_stored(features.pop(tap), settings.storage) for tap in list(features)}


@torch.no_grad()
def slice_probability(classifier: torch.nn.Module, pixels: Tensor) -> Tensor:
    """p(object) (batch,) of clean slices (batch, channels, height, width)."""
    logits: Tensor = classifier(pixels)
    return logits.float().softmax(1)[:, 1]


def score_maps(
    decoder: PixelDecoder,
    prototypes: Tensor,
    taps: Mapping[str, Tensor],
    size: Sequence[int],
    *,
    tile_pixels: int,
) -> Tensor:
    """The scores (batch, *size) of whole slices, of which no embedding is kept.

    `taps` is as in `PixelDecoder.embed_maps`, `prototypes` as of `class_prototypes`.
    """
    first = next(iter(taps.values()))
    scores = first.new_empty(len(first), *size, dtype=torch.float32)
    for place, embedding in decoder.embed_tiles(taps, size, tile_pixels=tile_pixels):
        scores[place] = prototype_score(embedding, prototypes)
    return scores


def _counterfactuals(
    config: Config, nets: FrozenNets, pixels: Tensor, keys: list[str], rows: Sequence[str]
) -> dict[str, Tensor]:
    """The maps of the rows that ask the diffusion model alone; absolute, on one scale."""
    scores = {}
    if "cdm" in rows:
        scores["cdm"] = cdm_saliency(
            nets.diffusion,
            nets.schedule,
            pixels,
            keys,
            timesteps=config.saliency.timesteps,
            num_noise_samples=config.saliency.num_noise_samples,
            smooth_pixels=config.saliency.smooth_pixels,
        )
    if "cg_diff" in rows:
        scores["cg_diff"] = cg_diff(
            nets.diffusion,
            nets.classifier,
            nets.schedule,
            pixels,
            keys,
            timestep=config.cg_diff.timestep,
            steps=config.cg_diff.steps,
            scale=config.cg_diff.scale,
            inversion=config.cg_diff.inversion,
            smooth_pixels=config.cg_diff.smooth_pixels,
            label_scale=config.cg_diff.label_scale,
        )
    if "cg_cdm" in rows:
        scores["cg_cdm"] = cg_cdm(
            nets.diffusion,
            nets.classifier,
            nets.schedule,
            pixels,
            keys,
            timestep=config.cg_cdm.timestep,
            steps=config.cg_cdm.steps,
            scale=config.cg_cdm.scale,
            tau=config.cg_cdm.tau,
            smooth_pixels=config.cg_cdm.smooth_pixels,
        )
    return scores


def run(config: Config, run: Run) -> dict[str, Any]:
    shards = shard_set(config, run)
    if run.is_main:
        remove_leftovers(run.folder)
    wait_for_everyone()
    segmenter = Segmenter.load(config, run)
    _check_mask_row(config, segmenter.rows)
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
        rule = _thresholds_without_masks(config, shards, folder, segmenter.rows)
        rule["mask_method"] = _mask_row(config, shards, folder, rule["thresholds"])
        write_atomically(run.folder / "thresholds.json", json.dumps(rule, indent=1))
    wait_for_everyone()
    rule = read_json(run.folder / "thresholds.json")
    for name in shards.patients["test"][processes().rank :: processes().world_size]:
        scores = PatientScores.load(folder, name)
        _write_masks(config, scores, shards.geometry(name), rule, run.folder)
    wait_for_everyone()
    return {"rows": list(segmenter.rows), "patients": len(patients)}


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
        rows = [row for row, name in enumerate(table.patients) if name == patient]
        if rows:
            places = [prepared.index(int(table.indices[row])) for row in rows]
            return [table.keys[row] for row in rows], table.read_images(rows), places
    raise ValueError(f"{patient} has no prepared slices")


def _thresholds_without_masks(
    config: Config, shards: ShardSet, folder: Path, rows: tuple[str, ...]
) -> dict[str, Any]:
    """The headline rule: for each row the threshold that `segment.negative_fraction` of the subject
    pixels of negative validation slices exceed. It uses image-level labels only."""
    fraction = config.segment.negative_fraction
    table = shards.split("validation")
    pools: dict[str, list[npt.NDArray[np.float32]]] = {row: [] for row in rows}
    for patient in shards.patients["validation"]:
        scores = PatientScores.load(folder, patient)
        mine = [name == patient for name in table.patients]
        negatives = table.indices[mine][table.labels[mine] == 0]
        negative = np.isin(shards.geometry(patient).indices, negatives)
        for row in rows:
            pools[row].append(scores.scores[row][negative][scores.body_mask[negative]])
    thresholds = {row: negative_threshold(np.concatenate(pools[row]), fraction) for row in rows}
    return {"rule": "negatives", "negative_fraction": fraction, "thresholds": thresholds}


def _check_mask_row(config: Config, rows: Sequence[str]) -> None:
    """Raise ValueError, before any patient is scored, where the row was left out in training."""
    chosen, ours = config.segment.mask_method, [row for row in OURS if row in rows]
    if chosen not in ("auto", *ours):
        raise ValueError(
            f"segment.mask_method={chosen} is no row of this run, which has {', '.join(ours)}: it "
            "was left out in train-decoder; take another or auto"
        )


def _mask_row(
    config: Config, shards: ShardSet, folder: Path, thresholds: Mapping[str, float]
) -> str:
    """The row whose masks new scans get: as set, or the best of ours by weak validation, the first
    of equals."""
    if config.segment.mask_method != "auto":
        return config.segment.mask_method
    ours = {row: thresholds[row] for row in OURS if row in thresholds}
    weak = weak_validation_of_methods(shards, folder, ours)
    return max(ours, key=lambda row: weak[row]["area_auroc"] or 0.0)


def _write_masks(
    config: Config, scores: PatientScores, geometry: Geometry, rule: dict[str, Any], folder: Path
) -> None:
    affine = np.array(geometry.affine)
    for row, threshold in rule["thresholds"].items():
        mask, probability = mask_and_probability(config, scores, row, geometry, threshold)
        target = folder / "masks" / row
        target.mkdir(parents=True, exist_ok=True)
        write_nifti(target / f"{scores.patient}.nii.gz", mask, affine)
        write_own_layout(folder / "chaos" / row, mask, geometry, config.data)
        if row == rule["mask_method"]:
            (folder / "probability").mkdir(exist_ok=True)
            path = folder / "probability" / f"{scores.patient}.nii.gz"
            write_nifti(path, probability, affine)
