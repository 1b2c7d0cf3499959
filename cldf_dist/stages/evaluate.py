"""Score the written masks of all test patients: strict protocol, intervals, paired comparisons.

A patient is scored as a whole, on all slices, in the scan's own grid. What used the masks to get
better (the upper bounds, the oracle thresholds) is kept apart and marked.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.config import Config
from cldf_dist.config import Evaluate as Settings
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.remote import ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.cache_parts import STORE
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.inference.run_store import check_same_slices
from cldf_dist.inference.seed_sources import PatchLogitLabels, seed_report
from cldf_dist.method.metrics import CaseScore, score_case
from cldf_dist.method.statistics import (
    bootstrap_interval,
    holm,
    paired_permutation_test,
    specificity,
    summarise,
)
from cldf_dist.method.threshold import OracleSearch, candidate_thresholds
from cldf_dist.methods import CLDF, CLDF_PLUS, ORACLE_INTENSITY, method_named
from cldf_dist.runs.run import DONE, Run, read_json, write_atomically
from cldf_dist.scoring.gate import gate_quality
from cldf_dist.scoring.intensity_threshold import oracle_intensity
from cldf_dist.scoring.mask_files import HEADLINE, ORACLE, OTSU, mask_path, read_mask, truth_path
from cldf_dist.scoring.masks import (
    FloatArray,
    PatientScores,
    native_scores,
    open_slices,
    otsu_mask,
)
from cldf_dist.scoring.slice_protocol import (
    ProtocolSlice,
    score_slices,
    slice_protocol_csv,
    slice_protocol_summary,
)
from cldf_dist.scoring.tables import results_table, slice_protocol_table
from cldf_dist.scoring.weak_validation import weak_validation_of_methods
from cldf_dist.system.progress import progress

METRICS = ("dice", "iou", "hd95_mm")
SAMPLED_SCORES = 20_000  # per patient; they place the oracle's thresholds


@dataclass(frozen=True)
class Case:
    """One patient under one method and one threshold rule."""

    patient: str
    method: str
    rule: str
    score: CaseScore


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Score all test patients; return what to keep with DONE.

    Writes summary.json, cases.csv and table.txt, and slice_protocol.csv and slice_protocol.txt
    apart."""
    prepare, cache, decoder, segment = (
        run.needs(name) for name in ("prepare", "cache", "train-decoder", "segment")
    )
    shards = ShardSet(prepare, on_damaged=config.data.on_damaged, cache=ShardCache.of(config.data))
    rule = read_json(segment / "thresholds.json")
    methods = list(rule["thresholds"])
    patients = [name for name in shards.patients["test"] if truth_path(prepare, name).is_file()]
    if not patients:
        print(
            f"evaluate: no test patient has a truth mask in {prepare}: masks cannot be scored, "
            "only how the classifiers tell slices apart; see docs/data.md to add masks",
            file=sys.stderr,
        )
        methods = []
    thresholds = {method: rule["thresholds"][method] for method in methods}
    oracles = _oracles(segment / "scores", patients, thresholds, config)
    cases: list[Case] = []
    protocol: list[ProtocolSlice] = []
    with progress("evaluate", len(patients), "patients") as counter:
        for patient in patients:
            cases += _score_patient(config, shards, segment, patient, oracles)
            scores = PatientScores.load(segment / "scores", patient)
            truth = read_mask(truth_path(prepare, patient))
            protocol += score_slices(scores, truth, shards.geometry(patient), methods)
            counter.advance()
    intensity, of_intensity = oracle_intensity(
        shards,
        segment / "scores",
        patients,
        lambda patient: read_mask(truth_path(prepare, patient)),
        config.segment.gate_probability,
    )
    cached = read_json(cache / DONE)
    summary: dict[str, Any] = {
        "strict": {
            **_strict(config, cases, oracles, rule),
            ORACLE_INTENSITY: intensity,
            "num_test_patients": len(patients),
            "num_without_truth": len(shards.patients["test"]) - len(patients),
        },
        "slice_protocol": slice_protocol_summary(protocol, methods),
        "weak_validation": weak_validation_of_methods(
            shards, segment / "scores", rule["thresholds"]
        ),
        "gate": gate_quality(config, shards, segment / "scores"),
        "seeds": cached.get("seeds") or {},
        "seed_cam": cached["seed_cam"],
        "seeds_plus": _seeds_of_plus(config, shards, cache / STORE, decoder),
        "mask_method": rule["mask_method"],
    }
    cases += [Case(patient, ORACLE_INTENSITY, ORACLE, score) for patient, score in of_intensity]
    dice = {method: row["dice"]["mean"] for method, row in summary["strict"]["methods"].items()}
    _write(run.folder, summary, cases, protocol)
    run.log(0, {f"dice/{method}": mean for method, mean in dice.items() if mean is not None})
    return {"num_test_patients": len(patients), "dice": dice}


def _strict(
    config: Config,
    cases: Sequence[Case],
    oracles: Mapping[str, OracleSearch],
    rule: Mapping[str, Any],
) -> dict[str, Any]:
    """The block of whole patients in summary.json."""
    methods = list(oracles)
    return {
        "methods": _methods_under(cases, HEADLINE, methods, config),
        "methods_otsu": _methods_under(cases, OTSU, methods, config),
        "oracle_threshold": {method: oracles[method].best() for method in methods},
        "comparisons": _comparisons(cases, methods, config, CLDF),
        "comparisons_plus": _comparisons(cases, methods, config, CLDF_PLUS),
        "headline_rule": _in_words(rule),
        "confidence": config.evaluate.confidence,
        "num_without_object": _num_without_object(cases),
    }


def _write(
    folder: Path,
    summary: Mapping[str, Any],
    cases: Iterable[Case],
    protocol: Sequence[ProtocolSlice],
) -> None:
    """The files of the stage; the slice protocol's only where a patient has a truth mask."""
    write_atomically(folder / "cases.csv", _as_csv(cases))
    write_atomically(folder / "table.txt", results_table(summary))
    if summary["strict"]["num_test_patients"]:
        write_atomically(folder / "slice_protocol.csv", slice_protocol_csv(protocol))
        write_atomically(folder / "slice_protocol.txt", slice_protocol_table(summary))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1))


def _seeds_of_plus(config: Config, shards: ShardSet, store: Path, decoder: Path) -> dict[str, Any]:
    """Here, because a training opens no mask but those of the upper bounds."""
    threshold = read_json(decoder / DONE).get("patch_logit_threshold")
    if threshold is None:
        return {}
    if not store.is_dir():
        print(
            f"evaluate: {store} is gone: the seeds of {CLDF_PLUS} are not scored", file=sys.stderr
        )
        return {}
    cache, slices = FeatureCache(store), cached_slices(shards)
    check_same_slices(cache, slices)
    return seed_report(
        PatchLogitLabels(cache, threshold, config.plus.cam_threshold), slices.tables[0]
    )


def _oracles(
    folder: Path, patients: Sequence[str], headline_thresholds: Mapping[str, float], config: Config
) -> dict[str, OracleSearch]:
    """Per method, a search over quantiles of the test scores and the headline threshold."""
    sampled: dict[str, list[FloatArray]] = {method: [] for method in headline_thresholds}
    for name in patients:
        patient = PatientScores.load(folder, name)
        opened = open_slices(patient, config.segment.gate_probability)[:, None, None]
        for method, parts in sampled.items():
            scores = patient.scores[method][patient.body_mask & opened]
            if scores.size:
                step = max(1, scores.size // SAMPLED_SCORES)
                parts += [scores[::step], scores.max(keepdims=True)]
    return {
        m: OracleSearch(candidate_thresholds(parts, headline_thresholds[m]))
        for m, parts in sampled.items()
    }


def _score_patient(
    config: Config, shards: ShardSet, segment: Path, patient: str, oracles: dict[str, OracleSearch]
) -> Iterator[Case]:
    """Both rules of all methods on one patient; its scores also go to the oracles."""
    gate, min_ml = config.segment.gate_probability, config.segment.min_component_ml
    geometry = shards.geometry(patient)
    truth = read_mask(truth_path(shards.folder, patient))
    scores = PatientScores.load(segment / "scores", patient)
    num_true = int(np.count_nonzero(truth))
    for method, oracle in oracles.items():
        written = read_mask(mask_path(segment, method, patient))
        yield Case(patient, method, HEADLINE, score_case(written, truth, geometry.spacing))
        by_otsu = otsu_mask(scores, method, geometry, gate, min_component_ml=min_ml)
        yield Case(patient, method, OTSU, score_case(by_otsu, truth, geometry.spacing))
        native, allowed = native_scores(scores, method, geometry, gate)
        oracle.add(native[allowed], truth[allowed], num_true)


def _methods_under(
    cases: Sequence[Case], rule: str, methods: Sequence[str], config: Config
) -> dict[str, dict[str, Any]]:
    """Per method, what its patients give under one rule."""
    rows = {}
    for method in methods:
        scores = [case.score for case in cases if (case.method, case.rule) == (method, rule)]
        outcomes = [score.outcome for score in scores]
        rows[method] = {
            **{metric: _summarise(scores, metric, config) for metric in METRICS},
            "specificity": specificity(scores),
            "misses": outcomes.count("miss"),
            "false_alarms": outcomes.count("false_alarm"),
        }
    return rows


def _summarise(scores: Sequence[CaseScore], metric: str, config: Config) -> dict[str, Any]:
    settings = config.evaluate
    return summarise(
        [getattr(score, metric) for score in scores],
        confidence=settings.confidence,
        num_resamples=settings.resamples,
        seed=config.seed,
    )


def _comparisons(
    cases: Sequence[Case], methods: Sequence[str], config: Config, ours: str
) -> dict[str, dict[str, Any]]:
    """The Dice of `ours` minus each other method's, over the patients that both score.

    Holm's family are the methods that saw no mask; upper bounds get a difference but no test.
    """
    if ours not in methods:
        return {}
    dice = {method: _headline_dice(cases, method) for method in methods}
    rows = {}
    for method in methods:
        if method == ours:
            continue
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(dice[ours], dice[method], strict=True)
            if mine is not None and theirs is not None
        ]
        rows[method] = _difference(pairs, config.evaluate, config.seed)
        rows[method]["num_dropped"] = len(dice[ours]) - len(pairs)
        if pairs and not method_named(method).saw_masks:
            rows[method]["p"] = paired_permutation_test(*zip(*pairs), seed=config.seed)
    tested = {method: found["p"] for method, found in rows.items() if found["p"] is not None}
    for method, adjusted in holm(tested).items():
        rows[method]["p_holm"] = adjusted
    return rows


def _headline_dice(cases: Sequence[Case], method: str) -> list[float | None]:
    return [case.score.dice for case in cases if (case.method, case.rule) == (method, HEADLINE)]


def _difference(
    pairs: Sequence[tuple[float, float]], settings: Settings, seed: int
) -> dict[str, Any]:
    """Mean paired difference and its interval, the p-values left open."""
    differences = [ours - other for ours, other in pairs]
    low, high = bootstrap_interval(
        differences, confidence=settings.confidence, num_resamples=settings.resamples, seed=seed
    )
    return {
        "difference": float(np.mean(differences)) if differences else None,
        "low": None if isnan(low) else low,
        "high": None if isnan(high) else high,
        "p": None,
        "p_holm": None,
        "num_patients": len(pairs),
    }


def _num_without_object(cases: Iterable[Case]) -> int:
    return len({case.patient for case in cases if case.score.truth_voxels == 0})


def _in_words(rule: Mapping[str, Any]) -> str:
    if rule["rule"] != "negatives":
        return str(rule["rule"])
    return (
        f"one threshold per method, below which lie all but "
        f"{100 * rule['negative_fraction']:g} % of the body's pixels in negative validation "
        "slices; no mask was used to set it"
    )


def _as_csv(cases: Iterable[Case]) -> str:
    columns = (*METRICS, "outcome", "truth_ml", "predicted_ml")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("patient", "method", "rule", *columns))
    for case in cases:
        values = (getattr(case.score, column) for column in columns)
        writer.writerow((case.patient, case.method, case.rule, *values))
    return text.getvalue()
