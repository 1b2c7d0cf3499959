"""The results as plain text: the strict ones for the terminal and table.txt, slice_protocol.txt
apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cldf_dist.methods import CLDF, CLDF_PLUS, Role, marked, names_of
from cldf_dist.scoring.weak_validation import WEAK_RULE

UPPER_BOUNDS = names_of(Role.UPPER_BOUND)
SAW_MASKS = "saw the training masks"


def results_table(summary: Mapping[str, Any]) -> str:
    """summary.json for the terminal: means with their intervals, in plain text."""
    strict = summary["strict"]
    unscored = strict["num_without_truth"]
    if not strict["num_test_patients"]:
        return (
            f"None of the {unscored} test patients has a truth mask: masks are not scored.\n"
            "How the slice classifiers (the gate) tell labelled slices apart:\n"
            + _gate_block(summary["gate"])
            + "\n"
        )
    blocks = [
        f"Strict protocol: {strict['num_test_patients']} test patients, "
        f"{strict['num_without_object']} of them without the object; whole scans in 3-D, mean "
        f"[{100 * strict['confidence']:g} % interval over patients]."
        + (f"\n{unscored} more test patients have no truth mask." if unscored else ""),
        f"Headline rule: {strict['headline_rule']}.\n" + _scores_block(strict["methods"]),
        "Otsu's threshold within each slice\n" + _scores_block(strict["methods_otsu"]),
        "Oracle: one threshold per method, chosen WITH the test masks; not a result, only what the "
        "scores could reach\n" + _oracle_block(strict["oracle_threshold"]),
    ]
    if intensity := strict.get("oracle_intensity"):
        blocks.append(_intensity_line(intensity))
    for ours, key in ((CLDF, "comparisons"), (CLDF_PLUS, "comparisons_plus")):
        if strict.get(key):
            blocks.append(
                f"Dice of {ours} minus that of the other methods, over patients that both score\n"
                + _comparisons_block(strict[key])
            )
    if weak := summary.get("weak_validation"):
        blocks.append(f"Without any mask: {WEAK_RULE}\n" + _weak_block(weak))
    if set(UPPER_BOUNDS) & set(strict["methods"]):
        blocks.append(f"* {SAW_MASKS}: a reference, not a competitor")
    return "\n\n".join(blocks) + "\n"


def slice_protocol_table(summary: Mapping[str, Any]) -> str:
    """The block `slice_protocol` of summary.json for slice_protocol.txt: means with their standard
    deviations."""
    protocol = summary["slice_protocol"]
    blocks = [
        f"Slice protocol, only to compare with papers: {protocol['rule']}.\n"
        "These numbers must not stand beside those of table.txt: they leave out false alarms on "
        "other slices.",
        "As thresholded\n" + _slices_block(protocol["methods"]),
        "Largest component of each slice alone\n"
        + _slices_block(protocol["methods_largest_component"]),
        "Mean (standard deviation over slices). HD95 in pixels, both directions pooled: over all "
        "pixels of both\nmasks, as the published code computes it, and over the contours alone, as "
        "MedPy does on a 2-D slice.",
    ]
    if set(UPPER_BOUNDS) & set(protocol["methods"]):
        blocks.append(f"* {SAW_MASKS}: a reference, not a competitor")
    return "\n\n".join(blocks) + "\n"


def _gate_block(rows: Mapping[str, Any]) -> str:
    lines = [
        [split, _number(r["slice_accuracy"]), _number(r["slice_auroc"]), str(r["num_slices"])]
        for split, r in rows.items()
    ]
    return _aligned([["split", "accuracy", "AUROC", "slices"], *lines])


def _slices_block(rows: Mapping[str, Any]) -> str:
    header = ["method", "Dice", "IoU", "HD95 px", "HD95 px (contours)", "slices"]
    lines = [
        [
            marked(method),
            _spread(row["dice"]),
            _spread(row["iou"]),
            _spread(row["hd95_pixels"], digits=1),
            _spread(row["hd95_contour_pixels"], digits=1),
            str(row["num_slices"]),
        ]
        for method, row in rows.items()
    ]
    return _aligned([header, *lines])


def _scores_block(rows: Mapping[str, Any]) -> str:
    header = ["method", "Dice", "IoU", "HD95 mm", "specificity", "misses", "false alarms"]
    lines = [
        [
            marked(method),
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
    lines = [[marked(m), _number(r["dice"]), _number(r["threshold"], 4)] for m, r in rows.items()]
    return _aligned([["method", "oracle Dice", "threshold"], *lines])


def _intensity_line(found: Mapping[str, Any]) -> str:
    return (
        "oracle_intensity †, a lower bound: the best threshold on one channel, chosen WITH the "
        f"test masks\n{_threshold(found)}, Dice {_number(found['dice'])}; without the gate: "
        f"{_threshold(found['ungated'])}, Dice {_number(found['ungated']['dice'])}"
    )


def _threshold(found: Mapping[str, Any]) -> str:
    side = "above" if found["above"] else "below"
    return f"{found['channel']} {side} {_number(found['threshold'])}"


def _weak_block(rows: Mapping[str, Any]) -> str:
    lines = [
        [
            marked(method),
            _number(row["area_auroc"]),
            _number(row["false_area"], 4),
            str(row["num_slices"]),
        ]
        for method, row in rows.items()
    ]
    return _aligned([["method", "area AUROC", "false area", "slices"], *lines])


def _comparisons_block(rows: Mapping[str, Any]) -> str:
    lines = [
        [
            marked(method),
            _interval({**row, "mean": row["difference"]}, signed=True),
            _number(row["p"], 4),
            _number(row["p_holm"], 4),
            str(row["num_patients"]),
            str(row["num_dropped"]),
        ]
        for method, row in rows.items()
    ]
    return _aligned([["method", "difference", "p", "p (Holm)", "patients", "dropped"], *lines])


def _number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def _interval(values: Mapping[str, Any], digits: int = 3, *, signed: bool = False) -> str:
    mean = _number(values["mean"], digits, signed=signed)
    if values["low"] is None:
        return mean
    low, high = (_number(values[key], digits, signed=signed) for key in ("low", "high"))
    return f"{mean} [{low}, {high}]"


def _spread(values: Mapping[str, Any], digits: int = 3) -> str:
    if values["mean"] is None:
        return "-"
    return f"{_number(values['mean'], digits)} ({_number(values['std'], digits)})"


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
