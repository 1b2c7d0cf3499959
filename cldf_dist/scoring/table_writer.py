"""Numbers as cells, and tables of them as aligned text, Markdown or HTML. "-" is undefined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from cldf_dist.methods import marked


@dataclass(frozen=True)
class Cell:
    """A number in words, and its interval, standard deviation or counts."""

    value: str
    spread: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.spread}" if self.spread else self.value

    def __html__(self) -> str:
        """The markup that Jinja puts in for the cell; both parts are digits and punctuation."""
        if not self.spread:
            return self.value
        return f'{self.value} <span class="interval">{self.spread}</span>'


# title -> the cell of a row
Columns = Mapping[str, Callable[[Any], str | Cell]]


@dataclass(frozen=True)
class Table:
    """A header, and rows of as many cells.

    The first cell of a row is the name of a method, which is written with its mark, or another
    label, which is written as it is.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]

    @classmethod
    def of(cls, first: str, rows: Mapping[str, Any], columns: Columns) -> Table:
        """The table of `rows` by the label of a row; `first` is the title above the labels."""
        lines = [[name, *(cell(row) for cell in columns.values())] for name, row in rows.items()]
        return cls([first, *columns], lines)

    def text(self) -> str:
        """The table with aligned columns, without a final newline."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """The table in Markdown, without a final newline."""
        header, *rows = self._lines()
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _lines(self) -> list[list[str]]:
        rows = [[marked(str(first)), *map(str, cells)] for first, *cells in self.rows]
        return [list(self.header), *rows]


def format_number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """The number with this many decimal places."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def format_interval(
    mean: float | None, low: float | None, high: float | None,
    digits: int = 3, *, signed: bool = False,
) -> Cell:  # fmt: skip
    """`mean [low, high]`; the mean alone where the interval is undefined (None or NaN)."""
    value = format_number(mean, digits, signed=signed)
    if low is None or isnan(low):
        return Cell(value)
    bounds = (format_number(bound, digits, signed=signed) for bound in (low, high))
    return Cell(value, f"[{', '.join(bounds)}]")
