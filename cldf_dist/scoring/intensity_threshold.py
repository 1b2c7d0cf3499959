"""The lower bound `oracle_intensity`: one threshold on one channel, chosen with the test masks.

A method that uses more than a pixel's brightness should score higher. The search covers both sides
of every channel and many quantiles of the body's pixels in test slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.data.shards.table import ShardSet
from cldf_dist.method.metrics import CaseScore, score_case
from cldf_dist.method.threshold import OracleSearch
from cldf_dist.methods import ORACLE_INTENSITY
from cldf_dist.scoring.mask_files import read_mask, truth_path
from cldf_dist.scoring.masks import FloatArray, Mask, PatientScores, native_scores

SAMPLED_PIXELS = 20_000  # per patient; they place the thresholds
SIGNS = {True: 1.0, False: -1.0}  # object above the threshold, or below

NUM_EVEN = 65  # thresholds at equal distances from the lowest to the highest pixel
# fractions of the pixels below a threshold: denser towards both ends, where small objects are
TAILS = np.geomspace(0.5, 1e-4, 96)
FRACTIONS = np.unique([*np.linspace(0, 1, 65), *TAILS, *(1 - TAILS)])

Choice = tuple[int, bool]  # channel, whether the object is above the threshold


def oracle_intensity(
    shards: ShardSet, scores: Path, patients: Sequence[str], gate_probability: float
) -> tuple[dict[str, Any], list[tuple[str, CaseScore]]]:
    """The best channel, side and threshold with their mean Dice, and each patient's score.

    Gate, grid and mean are those of the other methods; `ungated` is the best choice on all slices.
    `scores` is the folder of `PatientScores`.
    """
    if not patients:
        return {}, []
    channels = list(shards.manifest["channels"])
    thresholds = _thresholds(shards, scores, patients, len(channels))
    best = {}
    for gate in dict.fromkeys((gate_probability, 0.0)):
        found = {choice: OracleSearch(tried) for choice, tried in thresholds.items()}
        for patient in patients:
            truth = read_mask(truth_path(shards.folder, patient))
            for choice, values, allowed in _maps(shards, scores, patient, list(thresholds), gate):
                found[choice].add(values[allowed], truth[allowed], int(truth.sum()))
        best[gate] = _best(found, channels)
    chosen = best[gate_probability]
    if chosen["dice"] is None:
        return {**chosen, "ungated": best[0.0]}, []
    choice = (channels.index(chosen["channel"]), bool(chosen["above"]))
    cases = []
    for patient in patients:
        truth = read_mask(truth_path(shards.folder, patient))
        for _, values, allowed in _maps(shards, scores, patient, [choice], gate_probability):
            mask = (values > SIGNS[choice[1]] * chosen["threshold"]) & allowed
            score = score_case(mask, truth, shards.geometry(patient).spacing)
            cases.append((patient, score))
    return {**chosen, "ungated": best[0.0]}, cases


def _best(found: dict[Choice, OracleSearch], channels: Sequence[str]) -> dict[str, Any]:
    results = {choice: search.best() for choice, search in found.items()}
    (channel, above), result = max(results.items(), key=lambda item: item[1]["dice"] or 0.0)
    threshold = result["threshold"]
    return {
        "channel": channels[channel],
        "above": above,
        "threshold": None if threshold is None else SIGNS[above] * threshold,
        "dice": result["dice"],
    }


def _thresholds(
    shards: ShardSet, scores: Path, patients: Sequence[str], num_channels: int
) -> dict[Choice, FloatArray]:
    """For each choice the signed intensities to try as thresholds, ascending."""
    sampled: list[FloatArray] = []  # (pixels, channels) of each patient
    for patient in patients:
        images, known = _images(shards, scores, patient)
        pixels = np.moveaxis(images, 1, -1)[known.body_mask]
        sampled.append(pixels[:: max(1, len(pixels) // SAMPLED_PIXELS)])
    pooled = np.concatenate(sampled)
    if not len(pooled):
        pooled = np.zeros((1, num_channels), dtype=np.float32)
    even = np.linspace(pooled.min(axis=0), pooled.max(axis=0), NUM_EVEN)  # gaps hold no quantile
    tried = np.concatenate([np.quantile(pooled, FRACTIONS, axis=0), even])  # (thresholds, channels)
    return {
        (channel, above): np.unique((sign * tried[:, channel]).astype(np.float32))
        for channel in range(num_channels)
        for above, sign in SIGNS.items()
    }


def _maps(
    shards: ShardSet, scores: Path, patient: str, choices: Sequence[Choice], gate: float
) -> Iterator[tuple[Choice, FloatArray, Mask]]:
    """For each choice the signed intensities (x, y, slices) on the scan's grid, and the voxels that
    a mask may hold."""
    images, known = _images(shards, scores, patient)
    geometry = shards.geometry(patient)
    for channel in dict.fromkeys(channel for channel, _ in choices):
        maps = PatientScores(
            patient, {ORACLE_INTENSITY: images[:, channel]}, known.probability, known.body_mask
        )
        values, allowed = native_scores(maps, ORACLE_INTENSITY, geometry, gate)
        for above, sign in SIGNS.items():
            if (channel, above) in choices:
                yield (channel, above), np.float32(sign) * values, allowed


def _images(shards: ShardSet, scores: Path, patient: str) -> tuple[FloatArray, PatientScores]:
    """All prepared slices of a patient (slices, channels, height, width), and their scores.

    A damaged slice is 0, and its body mask in the scores is empty."""
    table = shards.split("test")
    prepared = list(shards.geometry(patient).indices)
    rows = [row for row, name in enumerate(table.patients) if name == patient]
    some = table.read_images(rows)
    images = np.zeros((len(prepared), *some.shape[1:]), dtype=np.float32)
    images[[prepared.index(int(table.indices[row])) for row in rows]] = some
    return images, PatientScores.load(scores, patient)
