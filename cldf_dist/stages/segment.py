"""Score maps and masks of the test patients, for CLDF and every baseline.

The cut of each row is set without masks: it is the score that a fixed share of the subject pixels
of negative validation slices exceeds. Gate, grid and post-processing are the same for all rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.data.nifti import write_nifti
from cldf_dist.data.shards import ShardSet
from cldf_dist.data.slices import Geometry, foreground
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.counterfactual import cdm_saliency, cg_cdm, cg_diff
from cldf_dist.method.features import extract_features
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.method.seeds import scale_to_unit
from cldf_dist.method.threshold import negative_cut
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.processes import accelerator, processes, wait_for_everyone
from cldf_dist.progress import progress
from cldf_dist.run import Run, write_atomically
from cldf_dist.stages.cache import FrozenNets, gradient_map_of, half_pixel_major
from cldf_dist.stages.loading import load_decoder, shard_set
from cldf_dist.stages.masks import (
    METHODS,
    SUPERVISED,
    FloatArray,
    PatientScores,
    native_scores,
    object_mask,
    write_own_layout,
)
from cldf_dist.whole_files import remove_leftovers

CAMS = ("gradcam", "gradcam_pp", "layercam")
PROBABILITY_WIDTH = 0.05  # score units: how fast the probability map turns around the cut


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
        if (folder / SUPERVISED / "DONE").exists():
            decoders[SUPERVISED] = load_decoder(folder / SUPERVISED)
        return cls(config, FrozenNets.load(run), decoders)

    @property
    def rows(self) -> tuple[str, ...]:
        """Every row that the settings have and whose nets are there."""
        left_out = {
            row
            for row, settings in (("cg_diff", self.config.cg_diff), ("cg_cdm", self.config.cg_cdm))
            if not settings.enabled
        }
        rows = (*METHODS, *(name for name in self.decoders if name != "cldf"))
        return tuple(row for row in rows if row not in left_out)

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
            parts.append(self._score_batch(images[batch], keys[batch], wanted))
        joined = {n: torch.cat([p[n].cpu() for p in parts]).numpy() for n in parts[0]}
        return PatientScores(patient, joined, joined.pop("probability"), foreground(images))

    def _score_batch(
        self, images: FloatArray, keys: list[str], rows: Sequence[str]
    ) -> dict[str, Tensor]:
        """The score map of each row, and "probability", which gates them all."""
        config, nets = self.config, self.nets
        device = accelerator().device
        inside = torch.from_numpy(foreground(images)).to(device)
        pixels = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
        maps, probability = gradient_map_of(config, nets, pixels, keys)
        scaled = {"gradient_map": maps}
        cams = [row for row in CAMS if row in rows]
        if cams:
            scaled |= class_activation_maps(nets.cam, pixels, config.cam.layer, cams)
        # a map scaled within its slice says where, p(object) says whether: only the product
        # can be compared with one cut across slices
        sure = probability[:, None, None]
        scores = {
            row: scale_to_unit(scaled[row], inside) * sure
            for row in (*CAMS, "gradient_map")
            if row in rows
        }
        scores |= _counterfactuals(config, nets, pixels, keys, rows)
        scores |= self._decoded(pixels, keys, [row for row in self.decoders if row in rows])
        return {
            **{row: scores[row].float() for row in rows},
            "probability": probability,
        }

    @torch.no_grad()
    def _decoded(self, pixels: Tensor, keys: list[str], rows: Sequence[str]) -> dict[str, Tensor]:
        if not rows:
            return {}
        nets = self.nets
        features = extract_features(
            nets.diffusion, nets.schedule, pixels, keys, self.config.features
        )
        taps = {tap: _as_decoded(value) for tap, value in features.items()}
        scores = {}
        for row in rows:
            decoder, prototypes = self.decoders[row]
            embedding = decoder.embed_maps(taps, pixels.shape[2:])
            scores[row] = prototype_score(embedding.movedim(1, -1), prototypes)
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
            noise_levels=config.saliency.noise_levels,
            draws=config.saliency.draws,
            smooth_pixels=config.saliency.smooth_pixels,
        )
    if "cg_diff" in rows:
        scores["cg_diff"] = cg_diff(
            nets.diffusion,
            nets.classifier,
            nets.schedule,
            pixels,
            keys,
            noise_level=config.cg_diff.noise_level,
            steps=config.cg_diff.steps,
            scale=config.cg_diff.scale,
            inversion=config.cg_diff.inversion,
            smooth_pixels=config.cg_diff.smooth_pixels,
        )
    if "cg_cdm" in rows:
        scores["cg_cdm"] = cg_cdm(
            nets.diffusion,
            nets.classifier,
            nets.schedule,
            pixels,
            keys,
            noise_level=config.cg_cdm.noise_level,
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
    folder = run.folder / "scores"
    folder.mkdir(exist_ok=True)
    patients = [*shards.patients["validation"], *shards.patients["test"]]
    mine = patients[processes().rank :: processes().world_size]
    with progress("segment", len(mine), "patients", shown=run.is_main) as bar:
        for name in mine:
            if not (folder / f"{name}.npz").exists():
                keys, images, places = _slices_of(shards, name)
                scores = segmenter.score(name, keys, images)
                scores.spread(places, len(shards.geometry(name).indices)).save(folder)
            bar.advance(note=name)
    wait_for_everyone()
    if run.is_main:
        cuts = _cuts_without_masks(config, shards, folder, segmenter.rows)
        write_atomically(run.folder / "thresholds.json", json.dumps(cuts, indent=1))
    wait_for_everyone()
    cuts = json.loads((run.folder / "thresholds.json").read_text())["cuts"]
    for name in shards.patients["test"][processes().rank :: processes().world_size]:
        scores = PatientScores.load(folder, name)
        _write_masks(config, scores, shards.geometry(name), cuts, run.folder)
    wait_for_everyone()
    return {"rows": list(segmenter.rows), "patients": len(patients)}


def _as_decoded(features: Tensor) -> Tensor:
    """(batch, levels, channels, h, w) -> (batch, levels x channels, h, w), rounded as cached."""
    stored = half_pixel_major(features).float()  # (batch, levels, h, w, channels)
    return stored.permute(0, 1, 4, 2, 3).flatten(1, 2)


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


def _cuts_without_masks(
    config: Config, shards: ShardSet, folder: Path, rows: tuple[str, ...]
) -> dict[str, Any]:
    """The headline rule: for each row the cut that `segment.negative_fraction` of the subject
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
            pools[row].append(scores.scores[row][negative][scores.foreground[negative]])
    cuts = {row: negative_cut(np.concatenate(pools[row]), fraction) for row in rows}
    return {"rule": "negatives", "negative_fraction": fraction, "cuts": cuts}


def _write_masks(
    config: Config, scores: PatientScores, geometry: Geometry, cuts: dict[str, float], folder: Path
) -> None:
    affine = np.array(geometry.affine)
    for row, cut in cuts.items():
        mask, probability = mask_and_probability(config, scores, row, geometry, cut)
        target = folder / "masks" / row
        target.mkdir(parents=True, exist_ok=True)
        write_nifti(target / f"{scores.patient}.nii.gz", mask.astype(np.uint8), affine)
        write_own_layout(folder / "chaos" / row, mask, geometry, config.data)
        if row == "cldf":
            (folder / "probability").mkdir(exist_ok=True)
            path = folder / "probability" / f"{scores.patient}.nii.gz"
            write_nifti(path, probability, affine)


def mask_and_probability(
    config: Config, scores: PatientScores, row: str, geometry: Geometry, cut: float
) -> tuple[npt.NDArray[np.bool_], FloatArray]:
    """The mask, and a map in [0, 1] that is 0.5 at the cut; both on the scan's grid."""
    native, allowed = native_scores(scores, row, geometry, config.segment.gate_probability)
    mask = object_mask(
        native,
        allowed,
        cut,
        spacing=geometry.spacing,
        min_component_ml=config.segment.min_component_ml,
    )
    probability = 1 / (1 + np.exp(-np.clip((native - cut) / PROBABILITY_WIDTH, -30, 30)))
    return mask, np.where(allowed, probability, 0).astype(np.float32)
