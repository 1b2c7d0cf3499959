"""Score the written masks of all test patients: strict protocol, intervals, paired comparisons.

A patient is scored as a whole, on all slices, in the scan's own grid. What used the masks to get
better (`supervised_decoder`, the oracle cut) is kept apart and marked.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Config
from cldf_dist.config import Evaluate as Settings
from cldf_dist.data.nifti import read_nifti
from cldf_dist.data.shards import ShardSet
from cldf_dist.method.metrics import CaseScore, auroc, score_case
from cldf_dist.method.statistics import (
    bootstrap_interval,
    holm,
    paired_permutation_test,
    specificity,
    summarise,
)
from cldf_dist.progress import progress
from cldf_dist.run import DONE, Run, write_atomically
from cldf_dist.stages.masks import (
    SUPERVISED,
    FloatArray,
    Mask,
    PatientScores,
    native_scores,
    open_slices,
    otsu_mask,
)

HEADLINE, OTSU = "headline", "otsu"  # threshold rules with a row per patient in cases.csv
OURS = "cldf"
METRICS = ("dice", "iou", "hd95_mm")
NUM_CUTS = 256  # tried by the oracle
SAMPLED_SCORES = 20_000  # per patient; they place the oracle's cuts
SAW_MASKS = "saw the training masks"


@dataclass(frozen=True)
class Case:
    """One patient under one method and one threshold rule."""

    patient: str
    method: str
    rule: str
    score: CaseScore


def run(config: Config, run: Run) -> dict[str, Any]:
    """Write summary.json, cases.csv and table.txt; return what to keep with DONE."""
    prepare, cache, segment = (run.needs(name) for name in ("prepare", "cache", "segment"))
    shards = ShardSet(prepare, on_damaged=config.data.on_damaged)
    rule = json.loads((segment / "thresholds.json").read_text())
    methods = list(rule["cuts"])
    patients = [name for name in shards.patients["test"] if truth_path(prepare, name).is_file()]
    if not patients:
        raise ValueError(
            f"{prepare} holds no truth mask of any of its {len(shards.patients['test'])} test "
            "patients, so nothing can be scored; put annotated patients into the test split "
            "(data.splits), or stop after: cldf segment"
        )
    oracles = _oracles(segment / "scores", patients, rule["cuts"], config)
    cases: list[Case] = []
    with progress("evaluate", len(patients), "patients") as counter:
        for patient in patients:
            cases += _score_patient(config, shards, segment, patient, oracles)
            counter.advance()
    summary: dict[str, Any] = {
        "strict": {
            "methods": _rows(cases, HEADLINE, methods, config),
            "methods_otsu": _rows(cases, OTSU, methods, config),
            "oracle_threshold": {method: oracles[method].best() for method in methods},
            "comparisons": _comparisons(cases, methods, config),
            "headline_rule": _in_words(rule),
            "confidence": config.evaluate.confidence,
            "num_test_patients": len(patients),
            "num_without_object": _num_without_object(cases),
            "num_without_truth": len(shards.patients["test"]) - len(patients),
        },
        "gate": _gate(config, shards, segment / "scores"),
        "seeds": json.loads((cache / DONE).read_text()).get("seeds") or {},
    }
    table = results_table(summary)
    write_atomically(run.folder / "cases.csv", _as_csv(cases))
    write_atomically(run.folder / "table.txt", table)
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1))
    print(table)
    dice = {method: row["dice"]["mean"] for method, row in summary["strict"]["methods"].items()}
    run.log(0, {f"dice/{method}": mean for method, mean in dice.items() if mean is not None})
    return {"num_test_patients": len(patients), "dice": dice}


def truth_path(prepare: Path, patient: str) -> Path:
    """Where `prepare` puts a test patient's mask, if there is one."""
    return prepare / "truth" / f"{patient}.nii.gz"


def mask_path(segment: Path, method: str, patient: str) -> Path:
    """Where `segment` puts the mask of the headline rule."""
    return segment / "masks" / method / f"{patient}.nii.gz"


def read_mask(path: Path) -> Mask:
    """A mask file as booleans (x, y, slices)."""
    return np.asarray(read_nifti(path)[0] > 0)


class OracleSearch:
    """Mean Dice of many cuts at once, patient by patient: memory does not grow with patients.

    It uses the test masks, so it says what a score map could reach, not what a method does. True
    negatives are left out of the mean, as in the table; small components are not removed.
    """

    def __init__(self, cuts: FloatArray) -> None:
        self.cuts = cuts  # ascending
        self._dice_sum = np.zeros(len(cuts))
        self._num_defined = np.zeros(len(cuts), dtype=np.int64)

    def add(self, scores: FloatArray, truth: Mask, num_true: int) -> None:
        """One patient: `scores` and `truth` of the voxels that a mask may hold, both 1-D.

        `num_true` counts the true voxels of the whole scan.
        """
        above = np.searchsorted(self.cuts, scores, side="left")  # cuts below each score
        predicted = _num_above(above, len(self.cuts))
        hits = _num_above(above[truth], len(self.cuts))
        total = predicted + num_true
        self._dice_sum += np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0)
        self._num_defined += total > 0

    def best(self) -> dict[str, float | None]:
        """The cut of the highest mean Dice; None where Dice is defined for no patient."""
        if not self._num_defined.any():
            return {"cut": None, "dice": None}
        dice = np.where(self._num_defined > 0, self._dice_sum / np.maximum(self._num_defined, 1), 0)
        best = int(np.argmax(dice))
        return {"cut": float(self.cuts[best]), "dice": float(dice[best])}


def _num_above(num_cuts_below: npt.NDArray[np.intp], num_cuts: int) -> npt.NDArray[np.int64]:
    """For each cut, how many scores exceed it."""
    counts = np.bincount(num_cuts_below, minlength=num_cuts + 1)
    return np.cumsum(counts[::-1])[::-1][1:]


def _oracles(
    folder: Path, patients: Sequence[str], headline_cuts: Mapping[str, float], config: Config
) -> dict[str, OracleSearch]:
    """Per method, a search over quantiles of the test scores and the headline rule's own cut."""
    sampled: dict[str, list[FloatArray]] = {method: [] for method in headline_cuts}
    for name in patients:
        patient = PatientScores.load(folder, name)
        opened = open_slices(patient, config.segment.gate_probability)[:, None, None]
        for method, parts in sampled.items():
            scores = patient.scores[method][patient.foreground & opened]
            if scores.size:
                step = max(1, scores.size // SAMPLED_SCORES)
                parts += [scores[::step], scores.max(keepdims=True)]
    return {m: OracleSearch(_cuts_to_try(parts, headline_cuts[m])) for m, parts in sampled.items()}


def _cuts_to_try(sampled: Sequence[FloatArray], headline_cut: float) -> FloatArray:
    """Ascending; quantiles that get denser towards the highest score."""
    cuts = [np.float32(headline_cut)]
    if sampled:
        scores = np.concatenate(sampled)
        shares = np.geomspace(1.0, 1.0 / scores.size, NUM_CUTS)
        cuts += [np.nextafter(scores.min(), np.float32(-np.inf)), *np.quantile(scores, 1 - shares)]
    return np.unique(np.asarray(cuts, dtype=np.float32))


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


def _rows(
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
    cases: Sequence[Case], methods: Sequence[str], config: Config
) -> dict[str, dict[str, Any]]:
    """CLDF's Dice minus each other row's, over the patients that both score.

    Holm's family are the baselines; `supervised_decoder` gets a difference but no test.
    """
    if OURS not in methods:
        return {}
    dice = {method: _headline_dice(cases, method) for method in methods}
    rows = {}
    for method in methods:
        if method == OURS:
            continue
        pairs = [
            (ours, other)
            for ours, other in zip(dice[OURS], dice[method], strict=True)
            if ours is not None and other is not None
        ]
        rows[method] = _difference(pairs, config.evaluate, config.seed)
        rows[method]["num_dropped"] = len(dice[OURS]) - len(pairs)
        if pairs and method != SUPERVISED:
            rows[method]["p"] = paired_permutation_test(*zip(*pairs), seed=config.seed)
    tested = {method: row["p"] for method, row in rows.items() if row["p"] is not None}
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


def _gate(config: Config, shards: ShardSet, folder: Path) -> dict[str, dict[str, Any]]:
    """How well the external classifier tells labelled slices apart; without a gate, at cut 0.5."""
    cut = config.segment.gate_probability or 0.5
    result = {}
    for split in ("validation", "test"):
        labels, probabilities = _slice_probabilities(shards, split, folder)
        right = (probabilities >= cut) == labels
        result[split] = {
            "slice_accuracy": float(right.mean()) if right.size else None,
            "slice_auroc": auroc(probabilities, labels) if right.size else None,
            "num_slices": int(right.size),
        }
    return result


def _slice_probabilities(
    shards: ShardSet, split: str, folder: Path
) -> tuple[Mask, npt.NDArray[np.float64]]:
    """Per labelled slice of a split: is it positive, and the classifier's probability of that."""
    table = shards.split(split)
    known: dict[tuple[str, int], float] = {}
    for patient in sorted(set(table.patients)):
        probability = PatientScores.load(folder, patient).probability.tolist()
        indices = shards.geometry(patient).indices
        known |= {(patient, index): p for index, p in zip(indices, probability, strict=True)}
    labelled = [
        (int(label) == 1, known[patient, int(index)])
        for patient, index, label in zip(table.patients, table.indices, table.labels)
        if label >= 0
    ]
    return (
        np.array([positive for positive, _ in labelled], dtype=bool),
        np.array([probability for _, probability in labelled], dtype=np.float64),
    )


def _in_words(rule: Mapping[str, Any]) -> str:
    if rule["rule"] != "negatives":
        return str(rule["rule"])
    return (
        f"one cut per method, below which lie all but {100 * rule['negative_fraction']:g} % of the "
        "subject's pixels in negative validation slices; no mask was used to set it"
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


def results_table(summary: Mapping[str, Any]) -> str:
    """summary.json for the terminal: means with their intervals, in plain text."""
    strict = summary["strict"]
    unscored = strict["num_without_truth"]
    blocks = [
        f"Strict protocol: {strict['num_test_patients']} test patients, "
        f"{strict['num_without_object']} of them without the object; whole scans in 3-D, mean "
        f"[{100 * strict['confidence']:g} % interval over patients]."
        + (f"\n{unscored} more test patients have no truth mask." if unscored else ""),
        f"Headline rule: {strict['headline_rule']}.\n" + _scores_block(strict["methods"]),
        "Otsu's threshold within each slice\n" + _scores_block(strict["methods_otsu"]),
        "Oracle: one cut per method, chosen WITH the test masks; not a result, only what the "
        "scores could reach\n" + _oracle_block(strict["oracle_threshold"]),
    ]
    if strict["comparisons"]:
        blocks.append(
            "Dice of cldf minus that of the other rows, over patients that both score\n"
            + _comparisons_block(strict["comparisons"])
        )
    if SUPERVISED in strict["methods"]:
        blocks.append(f"* {SAW_MASKS}: a reference, not a competitor")
    return "\n\n".join(blocks) + "\n"


def _scores_block(rows: Mapping[str, Any]) -> str:
    header = ["method", "Dice", "IoU", "HD95 mm", "specificity", "misses", "false alarms"]
    lines = [
        [
            _marked(method),
            _interval(row["dice"]),
            _interval(row["iou"]),
            _interval(row["hd95_mm"], digits=1),
            _share(row["specificity"]),
            str(row["misses"]),
            str(row["false_alarms"]),
        ]
        for method, row in rows.items()
    ]
    return _aligned([header, *lines])


def _oracle_block(rows: Mapping[str, Any]) -> str:
    lines = [[_marked(m), _number(r["dice"]), _number(r["cut"], 4)] for m, r in rows.items()]
    return _aligned([["method", "oracle Dice", "cut"], *lines])


def _comparisons_block(rows: Mapping[str, Any]) -> str:
    lines = [
        [
            _marked(method),
            _interval({**row, "mean": row["difference"]}, signed=True),
            _number(row["p"], 4),
            _number(row["p_holm"], 4),
            str(row["num_patients"]),
            str(row["num_dropped"]),
        ]
        for method, row in rows.items()
    ]
    return _aligned([["method", "difference", "p", "p (Holm)", "patients", "dropped"], *lines])


def _marked(method: str) -> str:
    return f"{method} *" if method == SUPERVISED else method


def _number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def _interval(values: Mapping[str, Any], digits: int = 3, *, signed: bool = False) -> str:
    mean = _number(values["mean"], digits, signed=signed)
    if values["low"] is None:
        return mean
    low, high = (_number(values[key], digits, signed=signed) for key in ("low", "high"))
    return f"{mean} [{low}, {high}]"


def _share(values: Mapping[str, Any]) -> str:
    if values["specificity"] is None:
        return "-"
    return (
        f"{values['specificity']:.2f} ({values['num_true_negatives']}/{values['num_empty_truth']})"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
