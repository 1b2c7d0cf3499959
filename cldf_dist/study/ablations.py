"""The table of variants, each compared with the run of the same seed without its change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cldf_dist.method.repeated_trainings import mean_of_trainings, paired_over_trainings
from cldf_dist.methods import METHODS, marked, method_named
from cldf_dist.scoring.table_writer import Cell, Table, format_interval, format_number
from cldf_dist.study.plan import BASE
from cldf_dist.study.rows import Row, column_mean, select, values_of
from cldf_dist.study.scores import StrictScores


def ablation_table(cases: Sequence[Row], seed_rows: Sequence[Row]) -> str:
    """One line a variant: its Dice, the paired difference to the base, the quality of its seeds.

    `cases` and `seed_rows` are those of one experiment, of all variants. The base is shown for the
    trainings that have a variant.
    """
    varied = [row for row in cases if row["variant"] != BASE]
    methods = _shown("always", cases)
    ours = [method for method in methods if not method_named(method).saw_masks]
    methods += _shown("requested", varied)
    header = [
        "variant", "seeds", *(f"Dice of {marked(method)}" for method in methods),
        *(title for method in ours for title in (f"{method} minus base [95 %]", "p")),
        *(f"{method}: seed precision, recall" for method in ours),
    ]  # fmt: skip
    lines = []
    for variant in (BASE, *values_of(varied, "variant")):
        seeds = values_of(varied if variant == BASE else select(varied, variant=variant), "seed")
        scores, base = (_scores_of(cases, name, seeds) for name in (variant, BASE))
        quality = [row for row in select(seed_rows, variant=variant) if row["seed"] in seeds]
        lines.append(
            [
                variant,
                ", ".join(seeds),
                *(format_number(mean_of_trainings(scores.values(m, "dice"))) for m in methods),
                *(cell for m in ours for cell in _difference(scores, base, variant, m)),
                *(seed_quality(select(quality, method=method)) for method in ours),
            ]
        )
    about = (
        "Each variant against the run of the same seed without the change, paired by patient; "
        "p-values are not adjusted for the number of variants. Precision and recall of object "
        "seeds on training slices: diagnostics that see masks."
    )
    return f"{about}\n\n{Table(header, lines).markdown()}"


def seed_quality(rows: Sequence[Row]) -> str:
    """Precision and recall of object seeds, means over the rows of seeds.csv."""
    columns = ("object_precision", "object_recall")
    return ", ".join(format_number(column_mean(rows, column)) for column in columns)


def _shown(when: str, rows: Sequence[Row]) -> list[str]:
    """The methods of these rows that the table shows always, or because a variant requests them."""
    found = values_of(rows, "method")
    return [m.name for m in METHODS if m.in_ablations == when and m.name in found]


def _difference(
    scores: StrictScores, base: StrictScores, variant: str, method: str
) -> tuple[str | Cell, str]:
    """The difference to the base and its p-value; empty for the base itself."""
    if variant == BASE:
        return "", ""
    row = paired_over_trainings(scores.values(method, "dice"), base.values(method, "dice"))
    interval = format_interval(row.difference, row.low, row.high, signed=True)
    return interval, format_number(row.p, 4)


def _scores_of(cases: Sequence[Row], variant: str, seeds: Sequence[str]) -> StrictScores:
    """The scores of a variant for these seeds, the patients in an order common to all variants."""
    mine = [row for row in select(cases, variant=variant) if row["seed"] in seeds]
    patients = tuple(values_of(cases, "patient"))
    return replace(StrictScores.of(mine), seeds=tuple(seeds), patients=patients)
