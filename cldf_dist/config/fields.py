"""Notes on the fields of the configuration: bounds, choices and marks, and how they are read.

A field is `Annotated[type, note, ...]`. Bounds are those of `annotated_types`, choices are a
`Literal`; a bound on the entries of a tuple stands on the type of its entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum, auto
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, MultipleOf

Count = Annotated[int, Ge(1)]
NaturalNumber = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
FractionBelowOne = Annotated[float, Interval(ge=0, lt=1)]
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
ProperFraction = Annotated[float, Interval(gt=0, lt=1)]


class Mark(Enum):
    """A property of a setting, for code that treats some settings alike; on a section, of all in
    it."""

    HARMLESS = auto()  # may differ between two starts of a stage: it computes the same
    DECIDES_CACHE = auto()  # with the nets it decides what the feature cache holds
    SELECTS_SOURCE = auto()  # chooses what is read from the native data
    NOT_IN_SHARDS = auto()  # says nothing about the content of prepared shards
    DRAWS_SPLIT = auto()  # of the random split, which a splits file replaces
    # a path, relative to the folder of its YAML file; on the command line to the working folder
    FROM_CONFIG_FILE = auto()
    HOME_ALLOWED = auto()  # a folder; a leading ~ is the home, also where no shell expands it


@dataclasses.dataclass(frozen=True)
class CheckedWhere:
    """The bounds of a setting or section count only where another setting has this value."""

    path: str
    value: Any


def hints(section: type) -> dict[str, Any]:
    """{field: its type with notes} of a dataclass."""
    return get_type_hints(section, include_extras=True)


def split_notes(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its notes, and the notes."""
    if get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


@cache
def marked(section: type, mark: Mark) -> tuple[str, ...]:
    """Dotted paths, below `section`, of the settings that carry the mark, in their order."""
    return tuple(path for path, marks in _marks_of_leaves(section, ()) if mark in marks)


def _marks_of_leaves(section: type, outer: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for name, hint in hints(section).items():
        kind, notes = split_notes(hint)
        if dataclasses.is_dataclass(kind):
            below = _marks_of_leaves(kind, (*outer, *notes))  # type: ignore[arg-type]
            yield from ((f"{name}.{path}", marks) for path, marks in below)
        else:
            yield name, (*outer, *notes)


def broken_bounds(config: Any) -> Iterator[str]:
    """One sentence (path, rule, value) for each setting outside its own bounds or choices."""
    yield from _broken_in(config, "", config)


def _broken_in(section: Any, prefix: str, config: Any) -> Iterator[str]:
    for name, hint in hints(type(section)).items():
        kind, notes = split_notes(hint)
        where = [note for note in notes if isinstance(note, CheckedWhere)]
        if any(attrgetter(note.path)(config) != note.value for note in where):
            continue
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from _broken_in(value, f"{prefix}{name}.", config)
        else:
            yield from _broken_value(f"{prefix}{name}", value, kind, notes)


def _broken_value(path: str, value: Any, kind: Any, notes: tuple[Any, ...]) -> Iterator[str]:
    if get_origin(kind) is Literal and value not in get_args(kind):
        yield f"{path} must be one of {', '.join(get_args(kind))}, got {value!r}"
    for note in notes:
        rule = _broken_bound(note, value)
        if rule:
            yield f"{path} must {rule}, got {list(value) if isinstance(value, tuple) else value}"
    if get_origin(kind) is tuple:
        entry_kind, entry_notes = split_notes(get_args(kind)[0])
        for i, entry in enumerate(value):
            yield from _broken_value(f"{path}[{i}]", entry, entry_kind, entry_notes)


def _broken_bound(bound: Any, value: Any) -> str:
    """The rule of a bound in words where the value breaks it (NaN breaks all), else ""."""
    match bound:
        case Gt(gt=limit) if not value > limit:
            return f"be > {limit}"
        case Ge(ge=limit) if not value >= limit:
            return f"be >= {limit}"
        case Lt(lt=limit) if not value < limit:
            return f"be < {limit}"
        case Le(le=limit) if not value <= limit:
            return f"be <= {limit}"
        case MultipleOf(multiple_of=step) if value % step:
            return f"be a multiple of {step}"
        case Len(min_length=length) if len(value) != length:
            return f"have {length} entries"
        case Interval(gt=gt, ge=ge, lt=lt, le=le) if any(_broken_bound(b, value) for b in bound):
            low = f"[{ge}" if gt is None else f"({gt}"
            high = f"{le}]" if lt is None else f"{lt})"
            return f"lie in {low}, {high}"
    return ""
