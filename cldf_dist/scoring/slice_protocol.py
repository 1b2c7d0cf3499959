"""The slice-level protocol of the published CDM code, for comparison with papers only.

Every test slice with an object pixel is scored alone, after Otsu's threshold within it: false
alarms on other slices cost nothing, an empty prediction has the best distance, pixels have no size.
The numbers are not comparable with those of the strict protocol. docs/method.md compares the two,
rule by rule, and lists the differences from the published code.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cldf_dist.data.slices import Geometry, to_native
from cldf_dist.method.slice_metrics import SliceScore, largest_components, slice_score
from cldf_dist.method.threshold import otsu_threshold
from cldf_dist.scoring.mask_files import to_lps
from cldf_dist.scoring.masks import FloatArray, Mask, PatientScores

RULE = (
    "slices with at least one object pixel, one by one, on the scan's own grid; Otsu's threshold "
    "within the slice, no gate; mean and standard deviation over slices; distance 0 for an empty "
    "mask"
)
METRICS = tuple(field.name for field in dataclasses.fields(SliceScore))


@dataclass(frozen=True)
class ProtocolSlice:
    """One slice with the object under one method."""

    patient: str
    index: int  # of the slice, as in its key
    method: str
    plain: SliceScore
    largest_component: SliceScore  # after all smaller components are removed


def score_slices(
    scores: PatientScores, truth: Mask, geometry: Geometry, methods: Sequence[str]
) -> list[ProtocolSlice]:
    """Score one patient's slices with the object, slice by slice, every method.

    `truth` is (x, y, slices) as in its file. A slice that was not prepared has an empty prediction.
    """
    truth = to_lps(truth, geometry)
    positive: list[int] = np.flatnonzero(truth.any(axis=(0, 1))).tolist()
    found = []
    for method in methods:
        maps = _native_maps(scores, method, geometry)
        for index in positive:
            predicted, true = _above_otsu(maps[..., index]), truth[..., index]
            plain = largest = slice_score(predicted, true)
            kept = largest_components(predicted)
            if not np.array_equal(kept, predicted):
                largest = slice_score(kept, true)
            found.append(ProtocolSlice(scores.patient, index, method, plain, largest))
    return sorted(found, key=lambda one: one.index)


def slice_protocol_summary(
    slices: Sequence[ProtocolSlice], methods: Sequence[str]
) -> dict[str, Any]:
    """The block `slice_protocol` of summary.json: mean and standard deviation over slices; None
    without one."""
    by_method = {method: [one for one in slices if one.method == method] for method in methods}
    return {
        "rule": RULE,
        "methods": {name: _means([s.plain for s in some]) for name, some in by_method.items()},
        "methods_largest_component": {
            name: _means([s.largest_component for s in some]) for name, some in by_method.items()
        },
    }


def slice_protocol_csv(slices: Iterable[ProtocolSlice]) -> str:
    """One line for each slice and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    suffixed = [f"{metric}_largest_component" for metric in METRICS]
    writer.writerow(("patient", "slice", "method", *METRICS, *suffixed))
    for one in slices:
        values = (*dataclasses.astuple(one.plain), *dataclasses.astuple(one.largest_component))
        writer.writerow((one.patient, one.index, one.method, *values))
    return text.getvalue()


def _means(scores: Sequence[SliceScore]) -> dict[str, Any]:
    """Mean and standard deviation of each metric, and the number of slices."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        values = [getattr(score, metric) for score in scores]
        found[metric] = {
            "mean": float(np.mean(values)) if values else None,
            "std": float(np.std(values)) if values else None,
        }
    return {**found, "num_slices": len(scores)}


def _native_maps(scores: PatientScores, method: str, geometry: Geometry) -> FloatArray:
    """Scores (x, y, slices) above the lowest of their slice, on the scan's grid, turned to LPS.

    0 outside the body, where the published images are black, and on slices that were not
    prepared. Otsu's threshold moves with the scale, so theirs, from 0 to 1 within the slice, would
    give the same mask.
    """
    maps, inside = scores.scores[method].astype(np.float32), scores.body_mask
    lowest = np.where(inside, maps, np.inf).min(axis=(1, 2), keepdims=True)
    return to_lps(to_native(np.where(inside, maps - lowest, 0), geometry), geometry)


def _above_otsu(maps: FloatArray) -> Mask:
    """The pixels (x, y) above Otsu's threshold; none of a constant map, where the published code
    divides by zero."""
    return np.asarray(maps > otsu_threshold(maps.ravel()))
