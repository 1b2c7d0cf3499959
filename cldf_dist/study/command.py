"""The command `cldf study`: runs one after the other, each in a subprocess, then the tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cldf_dist.runs.run import DONE, changed_keys, read_config, read_json
from cldf_dist.stages import STAGES
from cldf_dist.study.child import Child, wait_for_others
from cldf_dist.study.plan import (
    BASE,
    PlannedRun,
    Study,
    launcher_words,
    missing_needs,
    planned_runs,
    read_study,
)
from cldf_dist.study.rows import merge_rows, merge_rows_of, read_results
from cldf_dist.study.sharing import share_finished_stages, stage_of_its_own
from cldf_dist.study.tables import picture_names, write_tables
from cldf_dist.system.locks import FolderLock

STOPPED = 75  # all saved, the same command resumes; as in slurm/stage.sbatch


def conduct_study(words: Sequence[str], *, dry: bool = False, tables_only: bool = False) -> int:
    """Finish all runs of a study and make its tables; return the exit code.

    The code is 0, or 1 where a run failed, or 75 where the study was stopped. Raises ValueError
    and FileNotFoundError for a wrong study file, before anything runs.
    """
    files = [word for word in words if "=" not in word]
    if len(files) != 1:
        raise ValueError(f"study takes one study file, such as configs/study.yaml, got {files}")
    study, settings = read_study(files[0], [word for word in words if "=" in word])
    if tables_only:
        print(write_tables(Path(study.results)))
        return 0
    runs = planned_runs(study, Path(files[0]).parent, settings)
    _warn_of_missing(study, runs)
    if dry:
        for planned in runs:
            print(f"{planned.name}: {'finished' if _is_finished(planned) else 'to do'}")
        return 0
    results = Path(study.results)
    with ExitStack() as held:
        # the lock of the results lies beside them, since they are for publishing
        for folder in (Path(study.runs) / ".study", results.with_name(f".{results.name}.study")):
            held.callback(study_lock(folder).release)
        return _run_all(study, runs)


def study_lock(folder: Path) -> FolderLock:
    """A lock that keeps a second study out.

    It is not that of the runs' folder itself, which the tracker takes when it makes its tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder, remedy="give this study other runs=FOLDER and results=FOLDER")


def _warn_of_missing(study: Study, runs: Sequence[PlannedRun]) -> None:
    """Say on stderr which experiments are left out, and whether no variant is planned."""
    for name, path in missing_needs(study).items():
        _say(
            f"WARNING: the experiment {name} is LEFT OUT: there is no {path}; give its place with "
            f"experiments.{name}.needs=PATH"
        )
    if study.ablations.variants and all(planned.variant == BASE for planned in runs):
        _say("no variant is planned: ablations.seeds or ablations.experiments names no run here")


def _run_all(study: Study, runs: Sequence[PlannedRun]) -> int:
    results = Path(study.results)
    failed: dict[str, str] = {}
    with Child(launcher_words(study)) as child:
        for number, planned in enumerate(runs, 1):
            _say(f"{planned.name} ({number} of {len(runs)})")
            problem = _run_one(child, planned, runs)
            if child.received_signals:
                _say("stopped; the same command resumes")
                return STOPPED
            problem = problem or _collect(planned, runs, results)
            if problem:
                failed[planned.name] = problem
                _say(f"{planned.name} FAILED: {problem}")
    if any(planned.name not in failed for planned in runs):
        print(f"tables   {write_tables(results)}")
    for name, problem in failed.items():
        print(f"cldf: error: {name}: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(child: Child, planned: PlannedRun, runs: Sequence[PlannedRun]) -> str:
    """Finish one run; return what went wrong, or "". A finished run is only checked."""
    try:
        if _is_finished(planned):
            _check_settings(planned)
            _check_inputs(planned, runs)
            return ""
        for source in _sources(planned, runs):
            if shared := share_finished_stages(source.config, planned.config):
                _say(f"{planned.name}: takes over {', '.join(shared)} of {source.name}")
    except (ValueError, OSError) as error:
        return str(error)
    if planned.variant != BASE and not any(map(_is_finished, _sources(planned, runs))):
        return "the run that it varies is not finished"
    code: int | None = None
    others = wait_for_others(planned.config.run_folder, child)
    while not (child.received_signals or _is_finished(planned)):
        if code is not None and not others:
            return f"exit code {code}, its reason is above; the same command tries again"
        code = child.execute(["run", *planned.words])
        # where only the launcher was killed, its processes may still be at work
        others = wait_for_others(planned.config.run_folder, child)
    return ""


def _bases(planned: PlannedRun, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs of the same experiment without a change, one for each seed."""
    return [run for run in runs if (run.experiment, run.variant) == (planned.experiment, BASE)]


def _sources(planned: PlannedRun, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that this one may share stages with: the run that it varies, or the trainings with
    other seeds, for the prepared data."""
    varies = planned.variant != BASE
    return [run for run in _bases(planned, runs) if (run.seed == planned.seed) == varies]


def _is_finished(planned: PlannedRun) -> bool:
    return all((planned.config.run_folder / stage.name / DONE).is_file() for stage in STAGES)


def _check_settings(planned: PlannedRun) -> None:
    """Raise ValueError where a finished run has other settings than the study."""
    for stage in STAGES:
        folder = planned.config.run_folder / stage.name
        made_with = read_config(folder / "config.yaml")
        if changed := changed_keys(made_with, planned.config, stage.all_sections):
            raise ValueError(
                f"{folder} was made with {'; '.join(changed[:3])}; restore the setting, take "
                "other runs=FOLDER and results=FOLDER, or delete that folder and those of the "
                "stages after it"
            )


def _check_inputs(planned: PlannedRun, runs: Sequence[PlannedRun]) -> None:
    """Raise ValueError where inputs of a finished run's stages, or the run that it varies, have
    been made anew since."""
    folder = planned.config.run_folder
    for stage in STAGES:
        for name, identity in read_json(folder / stage.name / "run.json")["inputs"].items():
            if identity != read_json(folder / name / "run.json")["id"]:
                raise ValueError(
                    f"{folder / stage.name} was made from another {name} than the one there is "
                    "now; delete it and the folders of the stages after it"
                )
    for source in _sources(planned, runs) if planned.variant != BASE else ():
        if own := stage_of_its_own(source.config, planned.config):
            raise ValueError(
                f"{folder / own} is not that of {source.name}, with which it is compared; delete "
                f"{folder} to vary that run anew"
            )


def _collect(planned: PlannedRun, runs: Sequence[PlannedRun], results: Path) -> str:
    """Put a finished run into the results, and make the tables anew; return what went wrong, or "".

    The pictures are of the experiment's run with the lowest seed, as in the tables. They are drawn
    where they are missing or show an earlier evaluation.
    """
    folder = planned.config.run_folder
    try:
        merge_rows_of(planned.key, folder, results)
        if planned.variant == BASE and planned.seed == min(r.seed for r in _bases(planned, runs)):
            shown = {**planned.key, "evaluate": read_json(folder / "evaluate" / "run.json")["id"]}
            names = picture_names(planned.experiment)
            exist = all((results / name).is_file() for name in names)
            if not exist or shown not in read_results(results, "pictures"):
                from cldf_dist.study.pictures import draw_patients  # imports torch

                draw_patients(planned.experiment, planned.config, results)
                merge_rows(results / "pictures.csv", planned.key, [shown])
        write_tables(results)
    except (ValueError, OSError) as error:
        return f"its results cannot be kept: {error}"
    except KeyError as error:
        return f"{folder / 'evaluate'} lacks {error}: an earlier version made it; delete it"
    return ""


def _say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr, flush=True)
