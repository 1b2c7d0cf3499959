"""Score the written masks of all test patients: strict protocol, intervals, paired comparisons."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cldf_dist.config import Config
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.remote import ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.cache_parts import STORE
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.inference.run_store import check_same_slices
from cldf_dist.inference.seed_sources import PatchLogitLabels, seed_report
from cldf_dist.method.threshold import OracleSearch
from cldf_dist.methods import CLDF_PLUS, ORACLE_INTENSITY
from cldf_dist.runs.run import DONE, Run, read_json, write_atomically
from cldf_dist.scoring.gate import gate_quality
from cldf_dist.scoring.intensity_threshold import oracle_intensity
from cldf_dist.scoring.mask_files import mask_path, read_mask, truth_path
from cldf_dist.scoring.masks import PatientScores
from cldf_dist.scoring.slice_protocol import (
    ProtocolSlice,
    score_slices,
    slice_protocol_csv,
    slice_protocol_summary,
)
from cldf_dist.scoring.strict_protocol import (
    ORACLE,
    Case,
    cases_csv,
    oracle_searches,
    score_patient,
    strict_summary,
)
from cldf_dist.scoring.tables import results_table, slice_protocol_table
from cldf_dist.scoring.weak_validation import weak_validation_of_methods
from cldf_dist.system.progress import progress


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Score all test patients; return their number and the mean Dice of each method for DONE.

    Writes summary.json, cases.csv and table.txt, and slice_protocol.csv and slice_protocol.txt.
    """
    prepare, cache, decoder, segment = (
        run.needs(name) for name in ("prepare", "cache", "train-decoder", "segment")
    )
    shards = ShardSet(prepare, on_damaged=config.data.on_damaged, cache=ShardCache.of(config.data))
    rule = read_json(segment / "thresholds.json")
    patients = _patients_with_truth(shards)
    thresholds = rule["thresholds"] if patients else {}
    gate, scores = config.segment.gate_probability, segment / "scores"
    oracles = oracle_searches(scores, patients, thresholds, gate)
    cases, slices = _score_patients(config, shards, segment, patients, oracles)
    intensity, of_intensity = oracle_intensity(shards, scores, patients, gate)
    cached = read_json(cache / DONE)
    summary: dict[str, Any] = {
        "strict": {
            **strict_summary(cases, oracles, config),
            ORACLE_INTENSITY: intensity,
            "headline_rule": _in_words(rule),
            "num_test_patients": len(patients),
            "num_without_truth": len(shards.patients["test"]) - len(patients),
        },
        "slice_protocol": slice_protocol_summary(slices, list(thresholds)),
        "weak_validation": weak_validation_of_methods(shards, scores, rule["thresholds"]),
        "gate": gate_quality(config, shards, scores),
        "seeds": cached.get("seeds") or {},
        "seed_cam": cached["seed_cam"],
        "seeds_plus": _seeds_of_plus(config, shards, cache / STORE, decoder),
        "mask_method": rule["mask_method"],
    }
    cases += [Case(patient, ORACLE_INTENSITY, ORACLE, score) for patient, score in of_intensity]
    _write(run.folder, summary, cases, slices)
    dice = {method: row["dice"]["mean"] for method, row in summary["strict"]["methods"].items()}
    run.log(0, {f"dice/{method}": mean for method, mean in dice.items() if mean is not None})
    return {"num_test_patients": len(patients), "dice": dice}


def _patients_with_truth(shards: ShardSet) -> list[str]:
    """The test patients with a truth mask; a warning on stderr where there are none."""
    found = [p for p in shards.patients["test"] if truth_path(shards.folder, p).is_file()]
    if not found:
        print(
            f"evaluate: no test patient has a truth mask in {shards.folder}: masks cannot be "
            "scored, only how the classifiers tell slices apart; see docs/data.md to add masks",
            file=sys.stderr,
        )
    return found


def _score_patients(
    config: Config,
    shards: ShardSet,
    segment: Path,
    patients: Sequence[str],
    oracles: Mapping[str, OracleSearch],
) -> tuple[list[Case], list[ProtocolSlice]]:
    """The patients' scores by the strict protocol and by the slice protocol, of every method that
    has an oracle; their score maps go to the oracles."""
    cases: list[Case] = []
    slices: list[ProtocolSlice] = []
    with progress("evaluate", len(patients), "patients") as counter:
        for patient in patients:
            scores = PatientScores.load(segment / "scores", patient)
            truth = read_mask(truth_path(shards.folder, patient))
            geometry = shards.geometry(patient)
            written = {method: read_mask(mask_path(segment, method, patient)) for method in oracles}
            cases += score_patient(scores, truth, geometry, written, oracles, config)
            slices += score_slices(scores, truth, geometry, list(oracles))
            counter.advance()
    return cases, slices


def _write(
    folder: Path, summary: dict[str, Any], cases: Sequence[Case], slices: Sequence[ProtocolSlice]
) -> None:
    write_atomically(folder / "cases.csv", cases_csv(cases))
    write_atomically(folder / "table.txt", results_table(summary))
    if summary["strict"]["num_test_patients"]:
        write_atomically(folder / "slice_protocol.csv", slice_protocol_csv(slices))
        write_atomically(folder / "slice_protocol.txt", slice_protocol_table(summary))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1))


def _seeds_of_plus(config: Config, shards: ShardSet, store: Path, decoder: Path) -> dict[str, Any]:
    """The quality of the seeds of cldf_plus; {} where it was left out.

    Scored here, because a training opens no mask but those of the upper bounds."""
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


def _in_words(rule: Mapping[str, Any]) -> str:
    if rule["rule"] != "negatives":
        return str(rule["rule"])
    return (
        f"one threshold per method, exceeded by at most {100 * rule['negative_fraction']:g} % "
        "of the body's pixels in negative validation slices; set without masks"
    )
