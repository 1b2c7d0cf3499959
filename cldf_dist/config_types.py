"""Turn plain dicts, as YAML gives them, into dataclasses: strict about keys and types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from typing import Any


def build(section: type, mapping: Any, prefix: str, base: Any = None) -> Any:
    """An instance of the dataclass `section` from a mapping; unknown keys and types are errors.

    What the mapping leaves out is as in `base`, else as in the section's defaults: a section within
    it keeps the defaults that `section` gives it, not those of its own class.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{prefix.rstrip('.')} must hold keys, got {mapping!r}")
    hints = typing.get_type_hints(section)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"unknown config key {path}; {remedy}")
        if dataclasses.is_dataclass(hints[key]):
            kept = _default_of(section, key) if base is None else getattr(base, key)
            values[key] = build(typing.cast(type, hints[key]), value, f"{path}.", kept)
        elif typing.get_origin(hints[key]) is dict:
            values[key] = _named_sections(typing.get_args(hints[key])[1], value, path)
        else:
            values[key] = _coerce(hints[key], value, path)
    return section(**values) if base is None else dataclasses.replace(base, **values)


def _default_of(section: type, key: str) -> Any:
    """The default of a field that is a section, None where it must be given."""
    field = next(field for field in dataclasses.fields(section) if field.name == key)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _named_sections(section: type, mapping: Any, path: str) -> dict[str, Any]:
    """Sections under names of the writer's choice."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold names, each with its keys, got {mapping!r}")
    return {str(name): build(section, part, f"{path}.{name}.") for name, part in mapping.items()}


def _coerce(kind: Any, value: Any, path: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} must be a list of {item.__name__}, got {value!r}")
        return tuple(_coerce(item, entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-4 as text
            value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} must be a finite number, got {value}")
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not kind:
        raise ValueError(f"{path} must be {kind.__name__}, got {value!r}")
    return value
