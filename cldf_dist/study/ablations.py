"""The table of variants, each beside the run of the same seed without its change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cldf_dist.method.repeated_trainings import mean_of_trainings, paired_over_trainings
from cldf_dist.methods import METHODS, marked, method_named
from cldf_dist.study.cells import difference_cell, number_cell, table
from cldf_dist.study.plan import BASE
from cldf_dist.study.rows import Row, methods_of
from cldf_dist.study.scores import StrictScores


def ablation_table(cases: Sequence[Row], seed_rows: Sequence[Row]) -> str:
    """One row a variant: its Dice, the paired difference to the base, the quality of its seeds.

    The rows are those of one experiment, of all variants. The base is shown for the trainings that
    have a variant.
    """
    varied = [row for row in cases if row["variant"] != BASE]
    methods = _shown("always", cases)
    ours = [method for method in methods if not method_named(method).saw_masks]
    methods += _shown("requested", varied)
    header = [
        "variant", "seeds", *(f"Dice of {marked(method)}" for method in methods),
        *(cell for method in ours for cell in (f"{method} minus base [95 %]", "p")),
        *(f"{method}: seed precision, recall" for method in ours),
    ]  # fmt: skip
    lines = []
    for variant in dict.fromkeys((BASE, *(row["variant"] for row in varied))):
        mine = varied if variant == BASE else [row for row in varied if row["variant"] == variant]
        seeds = tuple(dict.fromkeys(row["seed"] for row in mine))
        scores = _scores_of(cases, variant, seeds)
        quality = [row for row in seed_rows if row["variant"] == variant and row["seed"] in seeds]
        lines.append(
            [
                variant,
                ", ".join(seeds),
                *(_dice_cell(scores, method) for method in methods),
                *_differences(scores, _scores_of(cases, BASE, seeds), variant, ours),
                *(seed_quality([row for row in quality if row["method"] == m]) for m in ours),
            ]
        )
    said = (
        "Each variant against the run of the same seed without the change, paired by patient; "
        "p-values are not adjusted for the number of variants. Precision and recall of object "
        "seeds on training slices: diagnostics that see masks."
    )
    return f"{said}\n\n{table(header, lines)}"


def _shown(when: str, rows: Sequence[Row]) -> list[str]:
    """The methods that the table shows always, or because a variant requests them."""
    found = methods_of(rows)
    return [m.name for m in METHODS if m.in_ablations == when and m.name in found]


def _differences(
    scores: StrictScores, base: StrictScores, variant: str, methods: Sequence[str]
) -> list[str]:
    """The difference to the base and its p-value, for each method."""
    if variant == BASE:
        return ["", ""] * len(methods)
    cells = []
    for method in methods:
        row = paired_over_trainings(scores.values(method, "dice"), base.values(method, "dice"))
        cells += [difference_cell(row), number_cell(row.p, 4)]
    return cells


def _scores_of(cases: Sequence[Row], variant: str, seeds: tuple[str, ...]) -> StrictScores:
    """The scores of a variant for these seeds, the patients in an order common to all variants."""
    found = StrictScores.of([row for row in cases if row["variant"] == variant], seeds)
    return replace(found, seeds=seeds, patients=tuple(dict.fromkeys(r["patient"] for r in cases)))


def _dice_cell(scores: StrictScores, method: str) -> str:
    return number_cell(mean_of_trainings(scores.values(method, "dice")))


def seed_quality(rows: Sequence[Row]) -> str:
    """Precision and recall of object seeds, means over the rows of seeds.csv."""
    cells = []
    for column in ("object_precision", "object_recall"):
        values = [float(row[column]) for row in rows if row.get(column)]
        cells.append(number_cell(float(np.mean(values))) if values else "-")
    return ", ".join(cells)
