"""From score maps at the prepared resolution to masks in the scan's own grid, alike for every
method.

`segment` writes the masks of the headline rule with these functions, `evaluate` those of the other
threshold rules: same gate, same grid, same post-processing for CLDF and all baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Config, Data
from cldf_dist.data.slices import Geometry, to_native
from cldf_dist.system.files import atomic_write

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SURE = 1e-3  # a slice's p(object) counts as no closer to 0 or 1 than this
PROBABILITY_WIDTH = 0.05  # score units: how fast the probability map turns around the threshold


@dataclass(frozen=True)
class PatientScores:
    """The scores of one patient, at the prepared resolution."""

    patient: str
    scores: dict[str, FloatArray]  # method -> (slices, height, width); higher means object
    probability: FloatArray  # (slices,) of the object: the mean of what the classifiers say
    body_mask: Mask  # (slices, height, width)

    def save(self, folder: Path) -> None:
        """Write the scores as `<patient>.npz`, atomically."""
        arrays: dict[str, Any] = {
            f"score_{n}": s.astype(np.float32) for n, s in self.scores.items()
        }
        arrays |= {"probability": self.probability, "body_mask": self.body_mask}
        with atomic_write(folder / f"{self.patient}.npz") as file:
            np.savez_compressed(file, **arrays)

    def spread(self, places: Sequence[int], num_slices: int) -> PatientScores:
        """The same scores among `num_slices` slices; those without a score (their shard was
        damaged, and data.on_damaged=skip) hold no subject and pass no gate."""
        if len(places) == num_slices:
            return self

        def among_all(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
            whole = np.zeros((num_slices, *part.shape[1:]), part.dtype)
            whole[list(places)] = part
            return whole

        return PatientScores(
            self.patient,
            {name: among_all(scores) for name, scores in self.scores.items()},
            among_all(self.probability),
            among_all(self.body_mask),
        )

    @classmethod
    def load(cls, folder: Path, patient: str) -> PatientScores:
        """The scores that `save` wrote; raises ValueError where the file is damaged."""
        path = folder / f"{patient}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored}
        except (ValueError, EOFError, BadZipFile, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it and the stage's DONE, and segment again"
            ) from error
        scores = {n.removeprefix("score_"): a for n, a in arrays.items() if n.startswith("score_")}
        return cls(patient, scores, arrays["probability"], arrays["body_mask"])


def mask_and_probability(
    config: Config, scores: PatientScores, method: str, geometry: Geometry, threshold: float
) -> tuple[Mask, FloatArray]:
    """The mask, and a map in [0, 1] that is 0.5 at the threshold; both on the scan's grid."""
    native, allowed = native_scores(scores, method, geometry, config.segment.gate_probability)
    mask = object_mask(
        native,
        allowed,
        threshold,
        spacing=geometry.spacing,
        min_component_ml=config.segment.min_component_ml,
    )
    probability = 1 / (1 + np.exp(-np.clip((native - threshold) / PROBABILITY_WIDTH, -30, 30)))
    return mask, np.where(allowed, probability, 0).astype(np.float32)


def smoothed_over_slices(probability: FloatArray) -> FloatArray:
    """p(object) (slices,) of neighbouring slices, its logits weighted 1 : 2 : 1 with those of the
    slices below and above: an object spans slices, a classifier's mistake often does not."""
    bounded = np.clip(probability.astype(np.float64), SURE, 1 - SURE)
    logits = np.pad(np.log(bounded / (1 - bounded)), 1, mode="edge")
    mean = (logits[:-2] + 2 * logits[1:-1] + logits[2:]) / 4
    return np.asarray(1 / (1 + np.exp(-mean)), dtype=np.float32)


def open_slices(patient: PatientScores, gate_probability: float) -> Mask:
    """True (slices,) for slices that may hold the object: p(object) reaches the gate."""
    passed: Mask = patient.probability >= gate_probability
    return passed


def native_scores(
    patient: PatientScores, method: str, geometry: Geometry, gate_probability: float
) -> tuple[FloatArray, Mask]:
    """Score (x, y, slices) on the scan's own grid, and where a mask may lie at all.

    The second is False outside the body, on slices that were not prepared, and on slices that
    the classifier calls negative.
    """
    scores = to_native(patient.scores[method].astype(np.float32), geometry)
    allowed = patient.body_mask & open_slices(patient, gate_probability)[:, None, None]
    return scores, to_native(allowed.astype(np.float32), geometry) > 0.5


def object_mask(
    scores: FloatArray, allowed: Mask, threshold: float, *, spacing: tuple[float, float, float],
    min_component_ml: float = 0.0,
) -> Mask:  # fmt: skip
    """The allowed pixels above the threshold, without components below `min_component_ml`."""
    mask: Mask = (scores > threshold) & allowed
    if min_component_ml <= 0 or not mask.any():
        return mask
    import cc3d

    voxel_ml = float(np.prod(spacing)) / 1000.0
    kept = cc3d.dust(mask, threshold=int(np.ceil(min_component_ml / voxel_ml)), connectivity=26)
    return np.asarray(kept, dtype=bool)


def otsu_mask(
    patient: PatientScores, method: str, geometry: Geometry, gate_probability: float,
    *, min_component_ml: float = 0.0,
) -> Mask:  # fmt: skip
    """The mask by Otsu's threshold within each slice that passes the gate, as the CDM code does."""
    from cldf_dist.method.threshold import otsu_threshold

    scores = patient.scores[method].astype(np.float32)
    above = np.full(scores.shape, -1.0, dtype=np.float32)
    for index in np.flatnonzero(open_slices(patient, gate_probability)):
        inside = scores[index][patient.body_mask[index]]
        if inside.size:
            above[index] = scores[index] - otsu_threshold(inside)
    shifted = PatientScores(
        patient.patient, {method: above}, patient.probability, patient.body_mask
    )
    native, allowed = native_scores(shifted, method, geometry, gate_probability)
    return object_mask(
        native, allowed, 0.0, spacing=geometry.spacing, min_component_ml=min_component_ml
    )


def write_own_layout(folder: Path, mask: Mask, geometry: Geometry, data: Data) -> None:
    """Write a mask (x, y, slices) as the data set itself keeps its masks, where that is not NIfTI:
    CHAOS's PNG files, unless its gray values cannot hold the object."""
    if not geometry.mask_names:
        return
    from cldf_dist.data.formats.chaos_masks import can_be_written, write_chaos_masks

    scanner = "CT" if data.modality == "ct" else "MR"
    if can_be_written(data.object, scanner=scanner):
        write_chaos_masks(folder, mask, geometry, object_name=data.object)
