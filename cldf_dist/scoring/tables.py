"""The tables of summary.json, for the terminal, table.txt, slice_protocol.txt and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cldf_dist.methods import CLDF, CLDF_PLUS, ORACLE_INTENSITY, marked, method_named
from cldf_dist.scoring.strict_protocol import COMPARISONS
from cldf_dist.scoring.table_writer import Cell, Columns, Table, format_interval, format_number
from cldf_dist.scoring.weak_validation import WEAK_RULE

# keys of summary.json with the quality of the seeds, of each of our methods
SEEDS = {CLDF: "seeds", CLDF_PLUS: "seeds_plus"}
SAW_MASKS = "* saw the training masks: a reference, not a competitor"

Rows = Mapping[str, Any]  # a block of summary.json: method -> its numbers


def results_table(summary: Mapping[str, Any]) -> str:
    """summary.json as plain text: means with their intervals, without the slice protocol."""
    strict = summary["strict"]
    unscored = strict["num_without_truth"]
    if not strict["num_test_patients"]:
        return (
            f"None of the {unscored} test patients has a truth mask: masks are not scored.\n"
            "Accuracy and AUROC of the slice classifiers (the gate) on labelled slices:\n"
            f"{gate_table(summary['gate']).text()}\n"
        )
    blocks = [
        f"Strict protocol: {strict['num_test_patients']} test patients, "
        f"{strict['num_without_object']} of them without the object; whole scans in 3-D, mean "
        f"[{100 * strict['confidence']:g} % interval over patients]."
        + (f"\n{unscored} more test patients have no truth mask." if unscored else ""),
        f"Headline rule: {strict['headline_rule']}.\n{strict_table(strict['methods']).text()}",
        f"Otsu's threshold within each slice\n{strict_table(strict['methods_otsu']).text()}",
        "Oracle: one threshold per method, chosen WITH the test masks; not a result, only what the "
        f"scores could reach\n{_oracle_table(strict['oracle_threshold']).text()}",
    ]
    if intensity := strict.get(ORACLE_INTENSITY):
        blocks.append(_intensity_line(intensity))
    for ours, key in COMPARISONS.items():
        if strict.get(key):
            blocks.append(
                f"Dice of {ours} minus that of the other methods, over patients that both score\n"
                + comparison_table(ours, strict[key]).text()
            )
    if weak := summary.get("weak_validation"):
        blocks.append(f"Without any mask: {WEAK_RULE}\n{_weak_table(weak).text()}")
    return _joined(blocks, strict["methods"])


def slice_protocol_table(summary: Mapping[str, Any]) -> str:
    """The slice protocol's block of summary.json as plain text."""
    block = summary["slice_protocol"]
    blocks = [
        f"Slice protocol, only for comparison with papers: {block['rule']}.\n"
        "These numbers are not comparable with those of table.txt: they leave out false alarms on "
        "other slices.",
        f"As thresholded\n{slices_table(block['methods']).text()}",
        "Largest component of each slice alone\n"
        + slices_table(block["methods_largest_component"]).text(),
        "Mean ± standard deviation over slices. HD95 in pixels, both directions pooled: over all "
        "pixels of both\nmasks, as the published code computes it, and over the contours alone, as "
        "MedPy does on a 2-D slice.",
    ]
    return _joined(blocks, block["methods"])


def strict_table(rows: Rows, oracle: Rows | None = None) -> Table:
    """The scores of each method; with `oracle` also the Dice of the best threshold."""
    columns: dict[str, Callable[[Any], str | Cell]] = {
        "Dice": lambda row: _interval(row["dice"]),
        "IoU": lambda row: _interval(row["iou"]),
        "HD95, mm": lambda row: _interval(row["hd95_mm"], digits=1),
        "specificity": lambda row: _specificity(**row["specificity"]),
        "misses": lambda row: str(row["misses"]),
        "false alarms": lambda row: str(row["false_alarms"]),
    }
    if oracle:
        rows = {name: {**row, "oracle": oracle[name]["dice"]} for name, row in rows.items()}
        columns["oracle Dice †"] = lambda row: format_number(row["oracle"])
    return Table.of("method", rows, columns)


def comparison_table(ours: str, rows: Rows) -> Table:
    """One of our methods against the others: difference of Dice, tests, numbers of patients."""
    columns: Columns = {
        "difference in Dice": lambda row: format_interval(
            row["difference"], row["low"], row["high"], signed=True
        ),
        "p": lambda row: format_number(row["p"], 4),
        "p (Holm)": lambda row: format_number(row["p_holm"], 4),
        "patients": lambda row: str(row["num_patients"]),
        "dropped": lambda row: str(row["num_dropped"]),
    }
    return Table.of(f"{method_named(ours).title} minus", rows, columns)


def slices_table(rows: Rows) -> Table:
    """The slice protocol's scores of each method."""
    columns: Columns = {
        "Dice": lambda row: _spread(row["dice"]),
        "IoU": lambda row: _spread(row["iou"]),
        "HD95, pixels": lambda row: _spread(row["hd95_pixels"], digits=1),
        "HD95 of the contours, pixels": lambda row: _spread(row["hd95_contour_pixels"], digits=1),
        "slices": lambda row: str(row["num_slices"]),
    }
    return Table.of("method", rows, columns)


def gate_table(rows: Rows) -> Table:
    """The slice classifiers' accuracy and AUROC on each split."""
    columns: Columns = {
        "accuracy": lambda row: format_number(row["slice_accuracy"]),
        "AUROC": lambda row: format_number(row["slice_auroc"]),
        "slices": lambda row: str(row["num_slices"]),
    }
    return Table.of("split", rows, columns)


def threshold_in_words(channel: str, above: bool, threshold: float | None) -> str:
    """A threshold on one channel, such as `flair above 0.125`."""
    return f"{channel} {'above' if above else 'below'} {format_number(threshold)}"


def _oracle_table(rows: Rows) -> Table:
    columns: Columns = {
        "oracle Dice": lambda row: format_number(row["dice"]),
        "threshold": lambda row: format_number(row["threshold"], 4),
    }
    return Table.of("method", rows, columns)


def _weak_table(rows: Rows) -> Table:
    columns: Columns = {
        "area AUROC": lambda row: format_number(row["area_auroc"]),
        "false area": lambda row: format_number(row["false_area"], 4),
        "slices": lambda row: str(row["num_slices"]),
    }
    return Table.of("method", rows, columns)


def _intensity_line(found: Mapping[str, Any]) -> str:
    gated, ungated = (
        f"{threshold_in_words(one['channel'], one['above'], one['threshold'])}, "
        f"Dice {format_number(one['dice'])}"
        for one in (found, found["ungated"])
    )
    return (
        f"{marked(ORACLE_INTENSITY)}, a lower bound: the best threshold on one channel, chosen "
        f"WITH the test masks\n{gated}; without the gate: {ungated}"
    )


def _joined(blocks: list[str], methods: Rows) -> str:
    """The blocks, with a note on methods that saw the training masks where there are any."""
    note = [SAW_MASKS] if any(method_named(name).saw_masks for name in methods) else []
    return "\n\n".join([*blocks, *note]) + "\n"


def _interval(values: Mapping[str, Any], digits: int = 3) -> Cell:
    return format_interval(values["mean"], values["low"], values["high"], digits)


def _spread(values: Mapping[str, Any], digits: int = 3) -> Cell:
    if values["mean"] is None:
        return Cell("-")
    return Cell(format_number(values["mean"], digits), f"± {format_number(values['std'], digits)}")


def _specificity(specificity: float | None, num_true_negatives: int, num_empty_truth: int) -> Cell:
    if specificity is None:
        return Cell("-")
    return Cell(format_number(specificity, 2), f"({num_true_negatives}/{num_empty_truth})")
