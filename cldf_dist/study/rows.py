"""The numbers of finished runs as CSV files, one row a patient, method or run.

A file is replaced as a whole; rows of a run take the place of those it had before.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cldf_dist.runs.run import read_json, seconds_of, write_atomically
from cldf_dist.stages import STAGES

KEY = ("experiment", "seed", "variant")
CASES = ("patient", "method", "rule", "dice", "iou", "hd95_mm", "outcome")
COMPONENTS = {
    "all": "methods",
    "largest": "methods_largest_component",
}  # of the block `slice_protocol`

# the columns that the tables read, where a file has any row
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
    """Put the numbers of a finished run into every CSV file of `results`.

    `key` says which run it is: experiment, seed, variant.
    """
    summary = read_json(run_folder / "evaluate" / "summary.json")
    tables: dict[str, list[dict[str, Any]]] = {
        "cases": _cases(run_folder / "evaluate" / "cases.csv"),
        "slice_protocol": _slice_protocol(summary["slice_protocol"]),
        "weak_validation": _weak_validation(summary),
        "seeds": _seeds(summary),
        "oracle_intensity": _oracle_intensity(summary["strict"]),
        "provenance": [_provenance(run_folder)],
    }
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        merge_rows(results / f"{name}.csv", key, [{**key, **_as_text(row)} for row in rows])


def merge_rows(path: Path, key: Row, rows: Sequence[Row]) -> None:
    """Replace the rows of `key` in a CSV file by `rows`, in their place; the file changes in one
    step."""
    before = read_rows(path, KEY)
    of_key = [all(row[name] == key[name] for name in KEY) for row in before]
    place = of_key.index(True) if any(of_key) else len(before)
    others = [row for row, replaced in zip(before, of_key) if not replaced]
    merged = [*others[:place], *rows, *others[place:]]
    columns = list(dict.fromkeys([*KEY, *(name for row in merged for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(merged, key=lambda row: (row["experiment"], int(row["seed"]))))
    write_atomically(path, text.getvalue())


def read_results(results: Path, name: str) -> list[Row]:
    """The rows of one of the study's files; ValueError where what the tables need is not there."""
    return read_rows(results / f"{name}.csv", COLUMNS[name])


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV file; none where there is no file.

    Raises ValueError, with file and line, where it is cut short or holds something else.
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


def _slice_protocol(protocol: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"method": method, "components": components, **_means(row)}
        for components, block in COMPONENTS.items()
        for method, row in protocol[block].items()
    ]


def _means(row: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of each metric, and the counts."""
    return {
        name: value["mean"] if isinstance(value, Mapping) else value for name, value in row.items()
    }


def _weak_validation(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of weak validation, each with the method's mean strict Dice."""
    strict = summary["strict"]["methods"]
    return [
        {"method": method, **row, "dice": strict[method]["dice"]["mean"]}
        for method, row in summary["weak_validation"].items()
        if method in strict
    ]


def _seeds(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The quality of the seeds of each of our methods, where training masks are known."""
    found = {"cldf": summary["seeds"], "cldf_plus": summary["seeds_plus"]}
    return [{"method": method, **quality} for method, quality in found.items() if quality]


def _oracle_intensity(strict: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = strict.get("oracle_intensity") or {}
    return [{name: value for name, value in found.items() if not isinstance(value, Mapping)}]


def _provenance(run_folder: Path) -> dict[str, Any]:
    """The provenance of a run, without paths; the seconds are those of all its stages,
    taken over ones too."""
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


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The methods of these methods, in the order in which they come first."""
    return list(dict.fromkeys(row["method"] for row in rows))
