"""The quality of the gate: classifiers of a run on labelled slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.labels import SliceLabel
from cldf_dist.method.metrics import auroc
from cldf_dist.scoring.masks import Mask, PatientScores


def gate_quality(config: Config, shards: ShardSet, folder: Path) -> dict[str, dict[str, Any]]:
    """Accuracy and AUROC of p(object) on labelled slices, by split; without a gate, at 0.5."""
    threshold = config.segment.gate_probability or 0.5
    result = {}
    for split in ("validation", "test"):
        labels, probabilities = _slice_probabilities(shards, split, folder)
        right = (probabilities >= threshold) == labels
        result[split] = {
            "slice_accuracy": float(right.mean()) if right.size else None,
            "slice_auroc": auroc(probabilities, labels) if right.size else None,
            "num_slices": int(right.size),
        }
    return result


def _slice_probabilities(
    shards: ShardSet, split: str, folder: Path
) -> tuple[Mask, npt.NDArray[np.float64]]:
    """Per labelled slice of a split: is it positive, and the classifiers' probability of that."""
    table = shards.split(split)
    known: dict[tuple[str, int], float] = {}
    for patient in sorted(set(table.patients)):
        probability = PatientScores.load(folder, patient).probability.tolist()
        indices = shards.geometry(patient).indices
        known |= {(patient, index): p for index, p in zip(indices, probability, strict=True)}
    labelled = [
        (int(label) == SliceLabel.POSITIVE, known[patient, int(index)])
        for patient, index, label in zip(table.patients, table.indices, table.labels)
        if label >= 0
    ]
    return (
        np.array([positive for positive, _ in labelled], dtype=bool),
        np.array([probability for _, probability in labelled], dtype=np.float64),
    )
