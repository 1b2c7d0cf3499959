"""What the slice labels of the validation patients say about each row, without any mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.data.shards.table import ShardSet
from cldf_dist.method.weak_validation import area_shares, weak_validation
from cldf_dist.scoring.masks import PatientScores

WEAK_RULE = (
    "pixels above the headline cut on the slices of the validation patients, before the gate: the "
    "area's AUROC for the slice label, and its share of the subject on negative slices, which is "
    "near the cut's own share unless a few slices hold most of it"
)


def weak_rows(
    shards: ShardSet, folder: Path, cuts: Mapping[str, float]
) -> dict[str, dict[str, float | int | None]]:
    """{row: area_auroc, false_area, num_slices} of the validation slices of known label."""
    table = shards.split("validation")
    shares: dict[str, list[Any]] = {row: [] for row in cuts}
    labels = []
    for patient in shards.patients["validation"]:
        scores = PatientScores.load(folder, patient)
        mine = np.array([name == patient for name in table.patients], dtype=bool)
        prepared = list(shards.geometry(patient).indices)
        places = [prepared.index(int(index)) for index in table.indices[mine]]
        labels.append(table.labels[mine])
        for row, cut in cuts.items():
            found = area_shares(scores.scores[row][places], scores.foreground[places], cut)
            shares[row].append(found)
    known = np.concatenate(labels)
    return {row: weak_validation(np.concatenate(parts), known) for row, parts in shares.items()}
