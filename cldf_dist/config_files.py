"""YAML files and `key=value` words, merged in their order: what `config.load` builds from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

FOLDERS, FOLDERS_OF_DATA = ("runs", "input", "output"), ("root",)
FILES_OF_DATA = ("splits", "labels")  # settings of `data` that are paths, meant from their file


def merged_settings(
    paths: Sequence[str], overrides: Sequence[str], fit_section: str, sections: Collection[str]
) -> dict[str, Any]:
    """What the files say, overlaid by the words; errors are those of `config.load`.

    `sections` are the keys at the top that hold keys themselves.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers: list[Any] = []
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no config file {path}; the ready ones are in configs/")
        try:
            layers.append(_with_absolute_paths(OmegaConf.load(path), Path(path).parent))
        except Exception as error:
            raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
        _check_sections(layers[-1], path, sections)
    try:
        words = OmegaConf.from_dotlist([_meant(word, fit_section) for word in overrides])
        layers.append(_with_absolute_paths(words, Path()))
        _check_sections(words, " ".join(overrides), sections)
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (OmegaConfBaseException, TypeError, YAMLError) as error:
        what = ", ".join((*paths, *overrides))
        raise ValueError(f"cannot merge {what}: {_one_line(error)}") from error
    if not isinstance(merged, dict):
        raise ValueError(f"{', '.join(paths)}: the top level must be a mapping of keys")
    settings = {str(key): value for key, value in merged.items()}
    if not settings.get("name"):
        settings["name"] = "-".join(Path(path).stem for path in paths) or "default"
    _find_home(settings, FOLDERS)
    _find_home(settings.get("data"), FOLDERS_OF_DATA)
    return settings


def _check_sections(layer: Any, where: str, sections: Collection[str]) -> None:
    from omegaconf import DictConfig

    for key in sections:
        value = layer.get(key) if isinstance(layer, DictConfig) else None
        if value is not None and not isinstance(value, DictConfig):
            raise ValueError(f"{where}: {key} must hold keys, got {value}")


def _find_home(settings: Any, keys: Sequence[str]) -> None:
    """Write out `~`, which shells leave alone behind `key=`."""
    for key in keys if isinstance(settings, dict) else ():
        if str(settings.get(key, "")).startswith("~"):
            settings[key] = str(Path(settings[key]).expanduser())


def _with_absolute_paths(layer: Any, folder: Path) -> Any:
    """The layer with `data.splits` and `data.labels`, where it sets them, meant from `folder`."""
    from omegaconf import DictConfig, OmegaConf

    data = layer.get("data") if isinstance(layer, DictConfig) else None
    for key in FILES_OF_DATA:
        if isinstance(data, DictConfig) and not OmegaConf.is_interpolation(data, key):
            path = data.get(key)
            if path and isinstance(path, str):
                data[key] = str((folder / Path(path).expanduser()).resolve())
    return layer


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
