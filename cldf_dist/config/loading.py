"""A `Config` from YAML files and `key=value` words, and back: strict about keys and types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cldf_dist.config.fields import Mark, hints, marked, split_notes
from cldf_dist.config.rules import check
from cldf_dist.config.schema import Config

Section = TypeVar("Section")


def load(paths: Sequence[str], overrides: Sequence[str] = (), *, fit_section: str = "") -> Config:
    """The defaults, overlaid by the YAML files in order, then by `key=value` words; checked.

    `fit_section` (say `cam.fit`) is what a bare `fit.KEY=VALUE` on the command line means.
    Raises ValueError with the dotted path for an unknown key, a wrong type or a broken rule, and
    FileNotFoundError for a missing file.
    """
    config = build(Config, _merged(paths, overrides, fit_section))
    check(config)
    return config


def build(section: type[Section], mapping: Any, prefix: str = "", base: Any = None) -> Section:
    """An instance of the dataclass `section` from a mapping; unknown keys and types are errors.

    What the mapping leaves out is as in `base`, else as in the section's defaults: a section within
    it keeps the defaults that `section` gives it, not those of its own class.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{prefix.rstrip('.')} must hold keys, got {mapping!r}")
    base = section() if base is None else base
    known = hints(section)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"unknown config key {path}; {_near_key(key, prefix, known)}")
        kind = split_notes(known[key])[0]
        if dataclasses.is_dataclass(kind):
            values[key] = build(typing.cast(type, kind), value, f"{path}.", getattr(base, key))
        elif typing.get_origin(kind) is dict:
            values[key] = _named_sections(typing.get_args(kind)[1], value, path)
        else:
            values[key] = _coerce(kind, value, path)
    built: Section = dataclasses.replace(base, **values)
    return built


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted path, the same in YAML, on the command line and in MLflow."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, ready for JSON and YAML."""
    return {
        item.name: to_plain(value)
        if dataclasses.is_dataclass(value := getattr(config, item.name))
        else (list(value) if isinstance(value, tuple) else value)
        for item in dataclasses.fields(config)
    }


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration that `to_plain` wrote."""
    return build(Config, plain)


def build_section(section: type[Section], plain: dict[str, Any]) -> Section:
    """One section (say `UNet`) from its plain form, with the same strictness as `load`."""
    return build(section, plain, f"{section.__name__}.")


def _merged(paths: Sequence[str], overrides: Sequence[str], fit_section: str) -> dict[str, Any]:
    """The settings of the files, overlaid by those of the words."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers = [_read_layer(path) for path in paths]
    try:
        words = OmegaConf.from_dotlist([_meant(word, fit_section) for word in overrides])
        layers.append(_checked_layer(OmegaConf.to_container(words), " ".join(overrides), Path()))
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (OmegaConfBaseException, TypeError, YAMLError) as error:
        what = ", ".join((*paths, *overrides))
        raise ValueError(f"cannot merge {what}: {_one_line(error)}") from error
    if not isinstance(merged, dict):
        raise ValueError(f"{', '.join(paths)}: the top level must be a mapping of keys")
    settings = {str(key): value for key, value in merged.items()}
    if not settings.get("name"):
        settings["name"] = "-".join(Path(path).stem for path in paths) or "default"
    _change_marked(settings, Mark.HOME_ALLOWED, _with_home)
    return settings


def _read_layer(path: str) -> Any:
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}; the ready ones are in configs/")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # OmegaConf's and YAML's errors have no common kind
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
    return _checked_layer(layer, path, Path(path).parent)


def _checked_layer(layer: Any, where: str, folder: Path) -> Any:
    """The layer with its paths made absolute: what is relative there is meant from `folder`."""
    for item in dataclasses.fields(Config):
        value = layer.get(item.name) if isinstance(layer, dict) else None
        if dataclasses.is_dataclass(item.default) and not _may_hold_keys(value):
            raise ValueError(f"{where}: {item.name} must hold keys, got {value}")
    _change_marked(
        layer, Mark.FROM_CONFIG_FILE, lambda path: str((folder / Path(path).expanduser()).resolve())
    )
    return layer


def _may_hold_keys(value: Any) -> bool:
    return value is None or isinstance(value, dict) or _is_reference(value)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value  # OmegaConf's interpolation


def _change_marked(settings: Any, mark: Mark, change: Callable[[str], str]) -> None:
    """Change the settings that carry the mark, where `settings` gives them as text."""
    for path in marked(Config, mark):
        *sections, key = path.split(".")
        holder = settings
        for name in sections:
            holder = holder.get(name) if isinstance(holder, dict) else None
        value = holder.get(key) if isinstance(holder, dict) else None
        if value and isinstance(value, str) and not _is_reference(value):
            holder[key] = change(value)


def _with_home(path: str) -> str:
    """The path with `~` written out, which shells leave alone behind `key=`."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _meant(word: str, fit_section: str) -> str:
    if "=" not in word:
        raise ValueError(f"expected key=value, got {word!r}")
    if word.startswith("fit."):
        if not fit_section:
            raise ValueError(
                f"{word.split('=')[0]}: say which training, e.g. diffusion.{word}; "
                "a bare fit.* is understood only with a train-* stage"
            )
        return fit_section + word.removeprefix("fit")
    return word


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _near_key(key: Any, prefix: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"


def _named_sections(section: type, mapping: Any, path: str) -> dict[str, Any]:
    """Sections under names of the writer's choice."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold names, each with its keys, got {mapping!r}")
    return {str(name): build(section, part, f"{path}.{name}.") for name, part in mapping.items()}


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """The value as the type of its field, which YAML and people write in other ways too."""
    if typing.get_origin(kind) is tuple:
        item = split_notes(typing.get_args(kind)[0])[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} must be a list of {item.__name__}, got {value!r}")
        return tuple(_coerce(item, entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if typing.get_origin(kind) is typing.Literal:
        kind = str  # `check` compares it with the choices
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and (is_number or isinstance(value, str)):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-4 as text
            value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} must be a finite number, got {value}")
    if kind is str and value is None:
        return ""
    if kind is str and is_number:
        return str(value)
    if type(value) is not kind:
        raise ValueError(f"{path} must be {kind.__name__}, got {value!r}")
    return value
