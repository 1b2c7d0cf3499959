"""Score maps and masks of the test patients (or of new scans), for CLDF and every baseline.

The cut of each row is set without masks: it is the score that a fixed share of the subject pixels
of negative validation slices exceeds. Gate, grid and post-processing are the same for all rows.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cldf_dist.config import Config
from cldf_dist.data import datasets
from cldf_dist.data.nifti import write_nifti
from cldf_dist.data.shards import ShardSet
from cldf_dist.data.slices import Geometry, foreground, prepare_volume
from cldf_dist.method.cam import class_activation_maps
from cldf_dist.method.counterfactual import cdm_saliency
from cldf_dist.method.features import extract_features
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.method.seeds import scale_to_unit
from cldf_dist.method.threshold import negative_cut
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.processes import accelerator, processes, wait_for_everyone
from cldf_dist.progress import progress
from cldf_dist.run import Run, changed_keys, read_config, write_atomically
from cldf_dist.stages import stage_named
from cldf_dist.stages.cache import FrozenNets, gradient_map_of, half_pixel_major
from cldf_dist.stages.loading import load_decoder, shard_set
from cldf_dist.stages.masks import (
    METHODS,
    SUPERVISED,
    FloatArray,
    PatientScores,
    native_scores,
    object_mask,
)

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
        return (*METHODS, *(name for name in self.decoders if name != "cldf"))

    def score(self, patient: str, keys: list[str], images: FloatArray) -> PatientScores:
        """Score maps of prepared slices (slices, channels, height, width)."""
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(keys), self.config.segment.batch_size):
            batch = slice(start, start + self.config.segment.batch_size)
            parts.append(self._score_batch(images[batch], keys[batch]))
        joined = {n: torch.cat([p[n].cpu() for p in parts]).numpy() for n in parts[0]}
        return PatientScores(patient, joined, joined.pop("probability"), foreground(images))

    def _score_batch(self, images: FloatArray, keys: list[str]) -> dict[str, Tensor]:
        config, nets = self.config, self.nets
        device = accelerator().device
        inside = torch.from_numpy(foreground(images)).to(device)
        pixels = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
        maps, probability = gradient_map_of(config, nets, pixels, keys)
        cams = class_activation_maps(nets.cam, pixels, config.cam.layer, CAMS)
        # a map scaled within its slice says where, p(object) says whether: only the product
        # can be compared with one cut across slices
        sure = probability[:, None, None]
        scores = {name: scale_to_unit(cams[name], inside) * sure for name in CAMS}
        scores["gradient_map"] = scale_to_unit(maps, inside) * sure
        saliency = config.saliency
        with torch.no_grad():
            scores["cdm"] = cdm_saliency(
                nets.diffusion,
                nets.schedule,
                pixels,
                keys,
                noise_levels=saliency.noise_levels,
                draws=saliency.draws,
                smooth_pixels=saliency.smooth_pixels,
            )
            features = extract_features(
                nets.diffusion, nets.schedule, pixels, keys, config.features
            )
            taps = {tap: _as_decoded(value) for tap, value in features.items()}
            for row, (decoder, prototypes) in self.decoders.items():
                embedding = decoder.embed_maps(taps, images.shape[2:])
                scores[row] = prototype_score(embedding.movedim(1, -1), prototypes)
        return {
            **{name: value.float() for name, value in scores.items()},
            "probability": probability,
        }


def run(config: Config, run: Run) -> dict[str, Any]:
    shards = shard_set(config, run)
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


def segment_new(config: Config) -> tuple[list[Path], list[str]]:
    """Masks and probability maps for new scans: config.input, a scan's folder or a folder of
    them; written to config.output in each scan's own grid.

    The run's own settings count, those of the command line must not contradict them. Returns the
    masks written, and one sentence for each scan that could not be segmented.
    """
    run = Run(config, "segment", ())
    folder = run.needs("segment")
    made = _settings_of_run(config, folder)
    cut = json.loads((folder / "thresholds.json").read_text())["cuts"]["cldf"]
    segmenter = Segmenter.load(made, Run(made, "segment", ()))
    scans = datasets.new_scans(made.data, Path(config.input).resolve())
    written, failed = [], []
    with progress("segment", len(scans), "scans") as bar:
        for path in scans:
            try:
                written.append(_segment_scan(segmenter, path, cut, Path(config.output)))
            except (ValueError, OSError) as error:
                failed.append(f"{path.name}: {error}")
            bar.advance(note=path.name)
    return written, failed


def _settings_of_run(config: Config, folder: Path) -> Config:
    """The settings that the nets were trained with; ValueError where `config` differs."""
    made = read_config(folder / "config.yaml")
    sections = stage_named("segment").all_sections
    changed = [
        change
        for change in changed_keys(made, config, sections)
        if not change.startswith(("data.root=", "data.dataset="))  # of the training data
    ]
    if changed:
        raise ValueError(
            f"{folder} was made with {'; '.join(changed[:3])}; new scans are segmented with the "
            "settings of the run: leave them out, or name another run"
        )
    batch = dataclasses.replace(made.segment, batch_size=config.segment.batch_size)
    return dataclasses.replace(made, runs=config.runs, name=config.name, segment=batch)


def _segment_scan(segmenter: Segmenter, path: Path, cut: float, output: Path) -> Path:
    config = segmenter.config
    volume = datasets.read_scan(config.data, path)
    slices, geometry = prepare_volume(volume, config.data)
    if not slices:
        raise ValueError("no slice shows enough of the subject (data.min_foreground_fraction)")
    images = np.stack([item.image for item in slices])
    scores = segmenter.score(volume.patient, [item.key for item in slices], images)
    mask, probability = _mask_and_probability(config, scores, "cldf", geometry, cut)
    write_nifti(output / f"{volume.patient}_probability.nii.gz", probability, volume.affine)
    target = output / f"{volume.patient}_mask.nii.gz"
    write_nifti(target, mask.astype(np.uint8), volume.affine)
    return target


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
        mask, probability = _mask_and_probability(config, scores, row, geometry, cut)
        target = folder / "masks" / row
        target.mkdir(parents=True, exist_ok=True)
        write_nifti(target / f"{scores.patient}.nii.gz", mask.astype(np.uint8), affine)
        if row == "cldf":
            (folder / "probability").mkdir(exist_ok=True)
            path = folder / "probability" / f"{scores.patient}.nii.gz"
            write_nifti(path, probability, affine)


def _mask_and_probability(
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
