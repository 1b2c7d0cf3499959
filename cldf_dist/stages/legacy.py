"""The slice-level protocol of the published CDM code, for comparison with papers only.

Positive slices of the test patients, each scored alone after Otsu's threshold: false alarms on
other slices cost nothing, an empty prediction has the best distance, pixels have no size. The
numbers must not stand beside those of the strict protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cldf_dist.config import Config
from cldf_dist.data.slices import Geometry
from cldf_dist.method.metrics import SliceScore, legacy_slice_scores
from cldf_dist.stages.masks import Mask, PatientScores, otsu_mask

RULE = "positive slices only, one by one; Otsu's threshold within the slice, no gate"


def legacy_scores(
    config: Config, scores: PatientScores, geometry: Geometry, truth: Mask, methods: Sequence[str]
) -> dict[str, list[SliceScore]]:
    """Per method, the scores of one patient's positive slices."""
    return {
        method: legacy_slice_scores(
            otsu_mask(scores, method, geometry, 0.0),
            truth,
            min_object_pixels=config.data.min_object_pixels,
        )
        for method in methods
    }


def legacy_summary(scores: Mapping[str, Sequence[SliceScore]]) -> dict[str, Any]:
    """`summary.json`'s legacy block: means over slices, hd95 in pixels; None without a slice."""
    return {"rule": RULE, "methods": {method: _means(rows) for method, rows in scores.items()}}


def _means(rows: Sequence[SliceScore]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return float(np.mean(values)) if values else None

    means = {name: mean(name) for name in ("dice", "iou", "hd95_pixels")}
    return {**means, "num_slices": len(rows)}
