"""The strict protocol: a patient is scored as a whole, on all slices, in the scan's own grid.

Results that used true masks (the upper bounds, the oracle thresholds) are kept apart and marked.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.config import Config
from cldf_dist.data.slices import Geometry
from cldf_dist.method.metrics import CaseScore, score_case
from cldf_dist.method.statistics import (
    holm,
    paired_permutation_test,
    specificity,
    summarise,
)
from cldf_dist.method.threshold import OracleSearch, candidate_thresholds
from cldf_dist.methods import CLDF, CLDF_PLUS, method_named
from cldf_dist.scoring.masks import (
    FloatArray,
    Mask,
    PatientScores,
    native_scores,
    open_slices,
    otsu_mask,
)

# threshold rules with a row per patient in cases.csv; the last is for `oracle_intensity` alone
HEADLINE, OTSU, ORACLE = "headline", "otsu", "oracle"
METRICS = ("dice", "iou", "hd95_mm")
# keys of summary.json's block `strict`, of each of our methods
COMPARISONS = {CLDF: "comparisons", CLDF_PLUS: "comparisons_plus"}
SAMPLED_SCORES = 20_000  # per patient; they place the oracle's thresholds


@dataclass(frozen=True)
class Case:
    """One patient under one method and one threshold rule."""

    patient: str
    method: str
    rule: str
    score: CaseScore


def oracle_searches(
    folder: Path, patients: Sequence[str], headline_thresholds: Mapping[str, float], gate: float
) -> dict[str, OracleSearch]:
    """For each method a search over quantiles of the test scores and the headline threshold."""
    sampled: dict[str, list[FloatArray]] = {method: [] for method in headline_thresholds}
    for name in patients:
        patient = PatientScores.load(folder, name)
        opened = open_slices(patient, gate)[:, None, None]
        for method, parts in sampled.items():
            scores = patient.scores[method][patient.body_mask & opened]
            if scores.size:
                step = max(1, scores.size // SAMPLED_SCORES)
                parts += [scores[::step], scores.max(keepdims=True)]
    return {
        method: OracleSearch(candidate_thresholds(parts, headline_thresholds[method]))
        for method, parts in sampled.items()
    }


def score_patient(
    scores: PatientScores,
    truth: Mask,
    geometry: Geometry,
    written: Mapping[str, Mask],
    oracles: Mapping[str, OracleSearch],
    config: Config,
) -> Iterator[Case]:
    """Cases of one patient under the headline rule and Otsu's; its scores also go to the oracles.

    `written` are the masks of the headline rule by method.
    """
    gate, min_ml = config.segment.gate_probability, config.segment.min_component_ml
    num_true = int(np.count_nonzero(truth))
    for method, mask in written.items():
        otsu = otsu_mask(scores, method, geometry, gate, min_component_ml=min_ml)
        for rule, predicted in ((HEADLINE, mask), (OTSU, otsu)):
            score = score_case(predicted, truth, geometry.spacing)
            yield Case(scores.patient, method, rule, score)
        native, allowed = native_scores(scores, method, geometry, gate)
        oracles[method].add(native[allowed], truth[allowed], num_true)


def strict_summary(
    cases: Sequence[Case], oracles: Mapping[str, OracleSearch], config: Config
) -> dict[str, Any]:
    """The block `strict` of summary.json, as far as the cases tell: scores and comparisons."""
    methods = list(oracles)
    without_object = {case.patient for case in cases if case.score.truth_voxels == 0}
    return {
        "methods": _scores_of_methods(cases, HEADLINE, methods, config),
        "methods_otsu": _scores_of_methods(cases, OTSU, methods, config),
        "oracle_threshold": {method: search.best() for method, search in oracles.items()},
        **{key: _comparisons(cases, methods, config, ours) for ours, key in COMPARISONS.items()},
        "confidence": config.evaluate.confidence,
        "num_without_object": len(without_object),
    }


def cases_csv(cases: Iterable[Case]) -> str:
    """One line for each patient, method and threshold rule."""
    columns = (*METRICS, "outcome", "truth_ml", "predicted_ml")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("patient", "method", "rule", *columns))
    for case in cases:
        values = (getattr(case.score, column) for column in columns)
        writer.writerow((case.patient, case.method, case.rule, *values))
    return text.getvalue()


def _scores_of_methods(
    cases: Sequence[Case], rule: str, methods: Sequence[str], config: Config
) -> dict[str, dict[str, Any]]:
    """For each method the means, specificity and counts of its patients under one rule."""
    found = {}
    for method in methods:
        scores = [case.score for case in cases if (case.method, case.rule) == (method, rule)]
        outcomes = [score.outcome for score in scores]
        found[method] = {
            **{
                metric: _summarise([getattr(score, metric) for score in scores], config)
                for metric in METRICS
            },
            "specificity": specificity(scores),
            "misses": outcomes.count("miss"),
            "false_alarms": outcomes.count("false_alarm"),
        }
    return found


def _summarise(values: Sequence[float | None], config: Config) -> dict[str, Any]:
    return summarise(
        values,
        confidence=config.evaluate.confidence,
        num_resamples=config.evaluate.resamples,
        seed=config.seed,
    )


def _comparisons(
    cases: Sequence[Case], methods: Sequence[str], config: Config, ours: str
) -> dict[str, dict[str, Any]]:
    """The Dice of `ours` minus that of each other method, over the patients that both score.

    Holm's family are the methods that saw no mask; the others get a difference but no test.
    """
    if ours not in methods:
        return {}
    dice = {method: _headline_dice(cases, method) for method in methods}
    found = {}
    for method in methods:
        if method == ours:
            continue
        pairs = [
            (mine, other)
            for mine, other in zip(dice[ours], dice[method], strict=True)
            if mine is not None and other is not None
        ]
        found[method] = _difference(pairs, config)
        found[method]["num_dropped"] = len(dice[ours]) - len(pairs)
        if pairs and not method_named(method).saw_masks:
            found[method]["p"] = paired_permutation_test(*zip(*pairs), seed=config.seed)
    tested = {method: row["p"] for method, row in found.items() if row["p"] is not None}
    for method, adjusted in holm(tested).items():
        found[method]["p_holm"] = adjusted
    return found


def _headline_dice(cases: Sequence[Case], method: str) -> list[float | None]:
    return [case.score.dice for case in cases if (case.method, case.rule) == (method, HEADLINE)]


def _difference(pairs: Sequence[tuple[float, float]], config: Config) -> dict[str, Any]:
    """The mean paired difference and its interval; the p-values are left open."""
    found = _summarise([ours - other for ours, other in pairs], config)
    return {"difference": found.pop("mean"), **found, "p": None, "p_holm": None}
