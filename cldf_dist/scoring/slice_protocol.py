"""The slice-level protocol of the published CDM code, for comparison with papers only.

Every test slice with an object pixel is scored alone, after Otsu's threshold within it: false
alarms on other slices cost nothing, an empty prediction has the best distance, pixels have no size.
The numbers must not stand beside those of the strict protocol. docs/method.md compares the two,
rule by rule, and says where this differs from the published code.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cldf_dist.data.slices import ORIENTATION, Geometry, to_native
from cldf_dist.method.slice_metrics import SliceScore, largest_components, slice_score
from cldf_dist.method.threshold import otsu_threshold
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
    truth = _upright(truth, geometry)
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
    plain: dict[str, list[SliceScore]] = {method: [] for method in methods}
    largest: dict[str, list[SliceScore]] = {method: [] for method in methods}
    for one in slices:
        plain[one.method].append(one.plain)
        largest[one.method].append(one.largest_component)
    return {
        "rule": RULE,
        "methods": _rows(plain),
        "methods_largest_component": _rows(largest),
    }


def slice_protocol_csv(slices: Iterable[ProtocolSlice]) -> str:
    """One line a slice and method, so that any part of the slices can be averaged again."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    suffixed = [f"{metric}_largest_component" for metric in METRICS]
    writer.writerow(("patient", "slice", "method", *METRICS, *suffixed))
    for one in slices:
        values = (*dataclasses.astuple(one.plain), *dataclasses.astuple(one.largest_component))
        writer.writerow((one.patient, one.index, one.method, *values))
    return text.getvalue()


def _rows(scores: Mapping[str, Sequence[SliceScore]]) -> dict[str, dict[str, Any]]:
    return {
        method: {
            **{metric: _spread([getattr(row, metric) for row in rows]) for metric in METRICS},
            "num_slices": len(rows),
        }
        for method, rows in scores.items()
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}


def _native_maps(scores: PatientScores, method: str, geometry: Geometry) -> FloatArray:
    """Scores (x, y, slices) above the lowest of their slice, on the scan's grid, turned to LPS.

    0 outside the body, where the published images are black, and on slices that were not
    prepared. Otsu's threshold moves with the scale, so theirs, from 0 to 1 within the slice, would
    give the same mask.
    """
    maps, inside = scores.scores[method].astype(np.float32), scores.body_mask
    lowest = np.where(inside, maps, np.inf).min(axis=(1, 2), keepdims=True)
    return _upright(to_native(np.where(inside, maps - lowest, 0), geometry), geometry)


def _above_otsu(maps: FloatArray) -> Mask:
    """Above Otsu's threshold of all pixels (x, y); empty for a constant map, where the published
    code divides by zero."""
    return np.asarray(maps > otsu_threshold(maps.ravel()))


def _upright(volume: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
    """A volume in its file's orientation, turned to LPS: slices are numbered as in their keys."""
    codes = nib.orientations.axcodes2ornt
    turn = nib.orientations.ornt_transform(codes(geometry.axes), codes(ORIENTATION))
    return np.asarray(nib.orientations.apply_orientation(volume, turn))
