"""The results of finished runs as CSV files, one row a patient, method or run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.methods import ORACLE_INTENSITY
from cldf_dist.runs.run import read_json, seconds_of, write_atomically
from cldf_dist.scoring.tables import SEEDS
from cldf_dist.stages import STAGES

KEY = ("experiment", "seed", "variant")
CASES = ("patient", "method", "rule", "dice", "iou", "hd95_mm", "outcome")
COMPONENTS = {"all": "methods", "largest": "methods_largest_component"}  # of the slice protocol

# the columns that every file with rows must have
COLUMNS = {
    "cases": (*KEY, *CASES),
    "slice_protocol": (*KEY, "method", "components"),
    "weak_validation": (*KEY, "method", "area_auroc", "dice"),
    "seeds": (*KEY, "method", "object_precision", "object_recall"),
    "oracle_intensity": KEY,
    "provenance": (*KEY, "commit", "torch", "device", "processes", "seconds"),
    "pictures": (*KEY, "evaluate"),
}

Row = dict[str, str]


def merge_rows_of(key: Row, run_folder: Path, results: Path) -> None:
    """Put the results of a finished run into every CSV file of `results`.

    `key` is the run's experiment, seed and variant.
    """
    summary = read_json(run_folder / "evaluate" / "summary.json")
    tables: dict[str, list[dict[str, Any]]] = {
        "cases": _cases(run_folder / "evaluate" / "cases.csv"),
        "slice_protocol": _slice_protocol(summary["slice_protocol"]),
        "weak_validation": _weak_validation(summary),
        "seeds": [{"method": m, **summary[name]} for m, name in SEEDS.items() if summary[name]],
        "oracle_intensity": [_without_sections(summary["strict"].get(ORACLE_INTENSITY) or {})],
        "provenance": [_provenance(run_folder)],
    }
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        merge_rows(results / f"{name}.csv", key, [{**key, **_as_text(row)} for row in rows])


def merge_rows(path: Path, key: Row, rows: Sequence[Row]) -> None:
    """Replace the rows of `key` in a CSV file by `rows`, in their place and in one step."""
    before = read_rows(path, KEY)
    of_key = [key.items() <= row.items() for row in before]
    place = of_key.index(True) if any(of_key) else len(before)
    others = [row for row, replaced in zip(before, of_key) if not replaced]
    merged = [*others[:place], *rows, *others[place:]]
    columns = list(dict.fromkeys([*KEY, *(name for row in merged for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(merged, key=lambda row: (row["experiment"], int(row["seed"]))))
    write_atomically(path, text.getvalue())


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows that hold these values in these columns."""
    return [row for row in rows if wanted.items() <= row.items()]


def values_of(rows: Iterable[Row], column: str) -> list[str]:
    """The different values of a column, in the order in which they come first."""
    return list(dict.fromkeys(row[column] for row in rows))


def column_mean(rows: Iterable[Row], column: str) -> float | None:
    """The mean of a column of numbers without its empty cells; None where all are empty."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return float(np.mean(values)) if values else None


def read_results(results: Path, name: str) -> list[Row]:
    """The rows of one of the study's files; ValueError where a column of the tables is missing."""
    return read_rows(results / f"{name}.csv", COLUMNS[name])


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV file; none where there is no file.

    Raises ValueError, with file and line, where the file is damaged. pandas would fill up short
    lines and the last line of a file that was cut off.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, str(error)) from error
    if text and not text.endswith("\n"):
        raise _damaged(path, "the last line is cut off")
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if rows and lacking:
        raise _damaged(path, f"there is no column {', '.join(lacking)}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise _damaged(path, f"line {number} has not the cells of line 1")
        if "seed" in columns and not row["seed"].isdecimal():
            raise _damaged(path, f"line {number}: seed must be a number, got {row['seed']!r}")
    return rows


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what}; restore it, or delete it and run the study again, which puts "
        "every finished run's rows there"
    )


def _cases(path: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in CASES} for row in read_rows(path)]


def _slice_protocol(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mean of each metric and the number of slices, by method and kept components."""
    return [
        {
            "method": method,
            "components": components,
            **{name: v["mean"] if isinstance(v, Mapping) else v for name, v in row.items()},
        }
        for components, block in COMPONENTS.items()
        for method, row in summary[block].items()
    ]


def _weak_validation(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The agreement of each method with slice labels, and its mean strict Dice."""
    strict = summary["strict"]["methods"]
    return [
        {"method": method, **row, "dice": strict[method]["dice"]["mean"]}
        for method, row in summary["weak_validation"].items()
        if method in strict
    ]


def _without_sections(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not isinstance(value, Mapping)}


def _provenance(run_folder: Path) -> dict[str, Any]:
    """The commit, versions and devices of a run, without paths, and the seconds of all its stages,
    including those taken over from another run."""
    starts = read_json(run_folder / "evaluate" / "provenance.json")["starts"]
    training = read_json(run_folder / "train-decoder" / "provenance.json")["starts"]
    state = starts[-1]["git"]
    seconds = sum(seconds_of(run_folder / stage.name) for stage in STAGES)
    return {
        "commit": state["commit"] + ("+changes" if state["dirty"] else ""),
        "torch": starts[-1]["versions"].get("torch", ""),
        "device": "; ".join(dict.fromkeys(training[-1]["devices"])),
        "processes": training[-1]["processes"],
        "seconds": round(seconds, 1),
    }


def _as_text(row: Mapping[str, Any]) -> Row:
    return {name: "" if value is None else str(value) for name, value in row.items()}
