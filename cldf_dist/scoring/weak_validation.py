"""Agreement of each method with the slice labels of the validation patients, without any mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.data.shards.table import ShardSet
from cldf_dist.method.weak_validation import area_fractions, weak_validation
from cldf_dist.scoring.masks import PatientScores

WEAK_RULE = (
    "pixels above the headline threshold on the slices of the validation patients, before the "
    "gate: the area's AUROC for the slice label, and its mean fraction of the body on negative "
    "slices, which is near the threshold's own fraction unless a few slices hold most of it"
)


def weak_validation_of_methods(
    shards: ShardSet, folder: Path, thresholds: Mapping[str, float]
) -> dict[str, dict[str, float | int | None]]:
    """{method: area_auroc, false_area, num_slices} of the validation slices of known label."""
    table = shards.split("validation")
    fractions: dict[str, list[Any]] = {method: [] for method in thresholds}
    labels = []
    for patient in shards.patients["validation"]:
        scores = PatientScores.load(folder, patient)
        mine = np.array([name == patient for name in table.patients], dtype=bool)
        prepared = list(shards.geometry(patient).indices)
        places = [prepared.index(int(index)) for index in table.indices[mine]]
        labels.append(table.labels[mine])
        body_mask = scores.body_mask[places]
        for method, threshold in thresholds.items():
            found = area_fractions(scores.scores[method][places], body_mask, threshold)
            fractions[method].append(found)
    known = np.concatenate(labels)
    return {
        method: weak_validation(np.concatenate(parts), known) for method, parts in fractions.items()
    }
