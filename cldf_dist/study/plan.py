"""The runs of a study file, with their settings and folders."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cldf_dist.config import EACH, Config, Mark, build, load, marked
from cldf_dist.methods import METHODS

BASE = "base"  # the variant without changes
REMEDY = "the study's seeds=, runs= and the names of its experiments and variants say it"
OWN = ("seed", "runs", "name")  # settings of a run that the study gives it
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Experiment:
    """A data set and settings, run once for each seed."""

    configs: tuple[str, ...] = ()  # YAML files of settings, relative to the study file's folder
    settings: tuple[str, ...] = ()  # key=value words
    needs: str = ""  # a file or folder; the experiment is left out where it does not exist


@dataclass(frozen=True)
class Variant:
    """A change of settings, applied to finished runs."""

    settings: tuple[str, ...] = ()  # key=value words, after those of the experiment


@dataclass(frozen=True)
class Ablations:
    """Variants of finished runs; they take over every stage whose settings they do not change."""

    seeds: tuple[int, ...] = ()
    experiments: tuple[str, ...] = ()
    variants: dict[str, Variant] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    runs: str = "runs/study"  # folder of all its runs
    results: str = "runs/study-results"  # folder of tables and pictures
    launcher: str = ""  # words that start `cldf`; empty: this Python, one process
    seeds: tuple[int, ...] = (0,)  # of every training
    experiments: dict[str, Experiment] = field(default_factory=dict)
    ablations: Ablations = field(default_factory=Ablations)


@dataclass(frozen=True)
class PlannedRun:
    """One `cldf run`."""

    experiment: str
    variant: str
    seed: int
    words: tuple[str, ...]  # config files, then settings
    config: Config

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.config.name

    @property
    def key(self) -> dict[str, str]:
        """The columns that say in CSV files which run a row is of."""
        return {"experiment": self.experiment, "seed": str(self.seed), "variant": self.variant}


def read_study(path: str, words: Sequence[str]) -> tuple[Study, tuple[str, ...]]:
    """The study of a file, overridden by the words that are keys of a study, and the other words,
    which are settings of every run.

    Raises FileNotFoundError without the file, and ValueError for an unknown key, a wrong type or a
    name that cannot be a folder's.
    """
    own = tuple(word for word in words if _is_own(word))
    for word in words:
        if word not in own and _key(word) in OWN:
            raise ValueError(f"a study gives each run its own {_key(word)}; {REMEDY}, got {word}")
    study: Study = build(Study, _merged(path, own))
    _check(study)
    return study, tuple(word for word in words if word not in own)


def missing_needs(study: Study) -> dict[str, str]:
    """{name of an experiment that is left out: the missing path}."""
    return {
        name: experiment.needs
        for name, experiment in study.experiments.items()
        if experiment.needs and not Path(experiment.needs).expanduser().exists()
    }


def planned_runs(study: Study, folder: Path, words: Sequence[str]) -> list[PlannedRun]:
    """All runs of the study in their order: seed by seed all experiments, then the variants.

    `folder` is the study file's, `words` are settings of every run. Raises ValueError and
    FileNotFoundError for wrong settings, as `config.load` does.
    """
    there = [name for name in study.experiments if name not in missing_needs(study)]
    found = [
        _planned(study, folder, words, name, BASE, seed) for seed in study.seeds for name in there
    ]
    ablations = study.ablations
    return found + [
        _planned(study, folder, words, name, variant, seed)
        for seed in ablations.seeds
        for name in ablations.experiments
        if name in there
        for variant in ablations.variants
    ]


def launcher_words(study: Study) -> list[str]:
    """The words that start `cldf`."""
    return shlex.split(study.launcher) or [sys.executable, "-m", "cldf_dist"]


def _planned(
    study: Study, folder: Path, words: Sequence[str], name: str, variant: str, seed: int
) -> PlannedRun:
    experiment = study.experiments[name]
    settings = [*_from_folder(experiment.settings, folder), *words]
    if variant != BASE:
        scored = [method.name for method in METHODS if method.in_variants]
        if not any(word.startswith("segment.methods=") for word in settings):
            settings.append(f"segment.methods=[{','.join(scored)}]")
        settings += _from_folder(study.ablations.variants[variant].settings, folder)
    settings += [f"seed={seed}", f"runs={study.runs}", f"name={name}/{variant}/seed{seed}"]
    files = [str(folder / path) for path in experiment.configs]
    where = f"experiments.{name}" if variant == BASE else f"ablations.variants.{variant}"
    try:
        config = load(files, settings)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error
    if "," in config.data.object or config.data.object == EACH:
        raise ValueError(
            f"experiments.{name}: data.object must be one object in a study, got "
            f"{config.data.object!r}; make an experiment of each"
        )
    return PlannedRun(name, variant, seed, (*files, *settings), config)


def _from_folder(words: Sequence[str], folder: Path) -> list[str]:
    """The settings of a study file; paths in them become absolute where they are relative to the
    file's folder, as in every file of settings."""
    found = []
    for word in words:
        key, _, value = word.partition("=")
        if key in marked(Config, Mark.FROM_CONFIG_FILE) and value:
            word = f"{key}={(folder / value).resolve()}"
        found.append(word)
    return found


def _key(word: str) -> str:
    return word.partition("=")[0]


def _is_own(word: str) -> bool:
    """True for a key of the study itself; `seeds.rule` and the like are settings of runs."""
    key = _key(word)
    return key in ("runs", "results", "launcher", "seeds") or key.startswith(
        ("experiments.", "ablations.")
    )


def _merged(path: str, words: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise FileNotFoundError(f"no study file {path}; the ready one is configs/study.yaml")
    try:
        layers = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(words)))
        return OmegaConf.to_container(layers, resolve=True)
    except Exception as error:  # OmegaConf's and YAML's errors have no common kind
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read the study {' '.join((path, *words))}: {said}") from error


def _check(study: Study) -> None:
    broken = [*_broken_seeds(study), *_broken_experiments(study), *_broken_sections(study)]
    if broken:
        raise ValueError("; ".join(broken))


def _broken_seeds(study: Study) -> Iterator[str]:
    if not study.seeds or len(set(study.seeds)) != len(study.seeds) or min(study.seeds) < 0:
        yield f"seeds must be different numbers >= 0, at least one, got {list(study.seeds)}"
    for seed in study.ablations.seeds:
        if seed not in study.seeds:
            yield f"ablations.seeds must be of seeds {list(study.seeds)}, got {seed}"
    for path in ("seeds", "experiments"):
        values = getattr(study.ablations, path)
        if len(set(values)) != len(values):
            yield f"ablations.{path} must differ, got {list(values)}"


def _broken_experiments(study: Study) -> Iterator[str]:
    if not study.experiments:
        yield "experiments must name at least one experiment"
    for name, experiment in study.experiments.items():
        if not experiment.configs:
            yield f"experiments.{name}.configs must name at least one config file"
    for name in study.ablations.experiments:
        if name not in study.experiments:
            yield f"ablations.experiments must be of {', '.join(study.experiments)}, got {name!r}"


def _broken_sections(study: Study) -> Iterator[str]:
    """Names that cannot be folders, and settings that are the study's own."""
    variants = study.ablations.variants
    if BASE in variants:
        yield f"ablations.variants: {BASE!r} is the run without changes; take another name"
    for path, sections in (("experiments", study.experiments), ("ablations.variants", variants)):
        for name, section in sections.items():
            if not PLAIN_NAME.fullmatch(name):
                yield f"{path} must have plain folder names (letters, digits, _ . -), got {name!r}"
            for word in section.settings:
                if _key(word) in OWN:
                    yield f"{path}.{name}.settings: {REMEDY}; take {word} out"
