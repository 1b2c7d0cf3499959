"""The runs that a study file requests, with their settings and folders."""

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
    """An experiment of a study: the settings that its runs share."""

    configs: tuple[str, ...] = ()  # YAML files of settings, meant from the study file's folder
    settings: tuple[str, ...] = ()  # key=value words
    needs: str = ""  # a file or folder, without which the experiment is left out


@dataclass(frozen=True)
class Variant:
    """A variant of the ablations: the settings that it changes."""

    settings: tuple[str, ...] = ()  # key=value words, after those of the experiment


@dataclass(frozen=True)
class Ablations:
    """Variants of finished runs, which share with them every stage that they do not change."""

    seeds: tuple[int, ...] = ()
    experiments: tuple[str, ...] = ()
    variants: dict[str, Variant] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study: its experiments, seeds and ablations."""

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
        """The first cells of its rows."""
        return {"experiment": self.experiment, "seed": str(self.seed), "variant": self.variant}


def read_study(path: str, words: Sequence[str]) -> tuple[Study, tuple[str, ...]]:
    """The study of a file, overlaid by those of the words that are its own; the other words are
    settings of every run.

    Raises FileNotFoundError without the file, ValueError for an unknown key, a wrong type or a
    name that is no folder name.
    """
    own = tuple(word for word in words if _is_own(word))
    for word in words:
        if word not in own and _key(word) in OWN:
            raise ValueError(f"a study gives each run its own {_key(word)}; {REMEDY}, got {word}")
    study: Study = build(Study, _merged(path, own))
    _check(study)
    return study, tuple(word for word in words if word not in own)


def missing_needs(study: Study) -> dict[str, str]:
    """The experiments that are left out here, each with what is not there."""
    return {
        name: experiment.needs
        for name, experiment in study.experiments.items()
        if experiment.needs and not Path(experiment.needs).expanduser().exists()
    }


def planned_runs(study: Study, folder: Path, words: Sequence[str]) -> list[PlannedRun]:
    """Every run of the study in its order: seed by seed all experiments, then the variants.

    `folder` is the study file's, `words` are settings of every run. Raises what `config.load` does
    for settings that are wrong, before anything has run.
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
    """The words of a study file, its `data.splits` and `data.labels` meant from its folder, as in
    every file of settings."""
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
    """True for a word about the study; `seeds.rule` and the like are settings of runs."""
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
    broken = [*_broken_names(study), *_broken_seeds(study), *_broken_settings(study)]
    if not study.experiments:
        broken.append("experiments must name at least one experiment")
    for name, experiment in study.experiments.items():
        if not experiment.configs:
            broken.append(f"experiments.{name}.configs must name at least one config file")
    for name in study.ablations.experiments:
        if name not in study.experiments:
            known = ", ".join(study.experiments)
            broken.append(f"ablations.experiments must be of {known}, got {name!r}")
    if broken:
        raise ValueError("; ".join(broken))


def _broken_names(study: Study) -> Iterator[str]:
    for path, names in (
        ("experiments", study.experiments),
        ("ablations.variants", study.ablations.variants),
    ):
        for name in names:
            if not PLAIN_NAME.fullmatch(name):
                yield f"{path} must have plain folder names (letters, digits, _ . -), got {name!r}"
    if BASE in study.ablations.variants:
        yield f"ablations.variants: {BASE!r} is the run without changes; take another name"


def _broken_seeds(study: Study) -> Iterator[str]:
    if not study.seeds or len(set(study.seeds)) != len(study.seeds) or min(study.seeds) < 0:
        yield f"seeds must be different numbers >= 0, at least one, got {list(study.seeds)}"
    for seed in study.ablations.seeds:
        if seed not in study.seeds:
            yield f"ablations.seeds must be of seeds {list(study.seeds)}, got {seed}"
    for path in ("seeds", "experiments"):
        asked = getattr(study.ablations, path)
        if len(set(asked)) != len(asked):
            yield f"ablations.{path} must differ, got {list(asked)}"


def _broken_settings(study: Study) -> Iterator[str]:
    for path, named in (
        ("experiments", study.experiments),
        ("ablations.variants", study.ablations.variants),
    ):
        for name, about in named.items():
            for word in about.settings:
                if _key(word) in OWN:
                    yield f"{path}.{name}.settings: {REMEDY}; take {word} out"
