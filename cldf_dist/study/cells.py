"""Numbers as the cells of a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np

from cldf_dist.method.repeated_trainings import (
    PairedDifference,
    Scores,
    crossed_interval,
    mean_of_trainings,
)


def mean_cell(scores: Scores, digits: int = 3, *, exists: Sequence[bool]) -> str:
    """The mean over trainings and patients with its interval; where not each training has the
    method, the mean of those that do, and no claim about others."""
    if not all(exists):
        mean = number_cell(mean_of_trainings(scores[np.array(exists)]), digits)
        return f"{mean} ({sum(exists)} of {len(exists)} trainings)"
    low, high = crossed_interval(scores)
    mean = number_cell(mean_of_trainings(scores), digits)
    return mean if isnan(low) else f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def difference_cell(row: PairedDifference, exists: Sequence[bool] = ()) -> str:
    """The difference with its interval; without one where a training lacks a method."""
    mean = number_cell(row.difference, signed=True)
    if not all(exists):
        return f"{mean} ({sum(exists)} of {len(exists)} trainings)"
    if row.low is None:
        return mean
    low, high = (number_cell(value, signed=True) for value in (row.low, row.high))
    return f"{mean} [{low}, {high}]"


def seeds_cell(differences: Sequence[float | None]) -> str:
    """Signed differences, one a seed."""
    return ", ".join(number_cell(value, signed=True) for value in differences)


def counts_cell(numbers: Sequence[int | None]) -> str:
    """Counts, one a seed; "-" for an unknown one."""
    return ", ".join("-" if number is None else str(number) for number in numbers)


def shares_cell(parts: Sequence[int], wholes: Sequence[int]) -> str:
    """Fractions as "part/whole", one a seed."""
    return ", ".join(f"{part}/{whole}" for part, whole in zip(parts, wholes))


def number_cell(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A rounded number; "-" for None."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
