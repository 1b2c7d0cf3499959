"""`cldf study`: its runs one after the other, each in a process of its own, then the tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cldf_dist.locks import FolderLock
from cldf_dist.run import DONE, changed_keys, read_config
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
from cldf_dist.study.rows import merge_rows_of
from cldf_dist.study.sharing import share_finished_stages
from cldf_dist.study.tables import picture_names, write_tables

STOPPED = 75  # all saved, the same command resumes; as in slurm/stage.sbatch


def run(words: Sequence[str], *, dry: bool = False, tables_only: bool = False) -> int:
    """Run what is not finished, report what fails; 0, 1 where a run failed, 75 where stopped.

    Raises what is wrong in the study itself before anything runs.
    """
    files = [word for word in words if "=" not in word]
    if len(files) != 1:
        raise ValueError(f"study takes one study file, such as configs/study.yaml, got {files}")
    study, settings = read_study(files[0], [word for word in words if "=" in word])
    if tables_only:
        print(write_tables(Path(study.results)))
        return 0
    runs = planned_runs(study, Path(files[0]).parent, settings)
    for name, path in missing_needs(study).items():
        print(
            f"study: WARNING: the experiment {name} is LEFT OUT: there is no {path}; give its "
            f"place with experiments.{name}.needs=PATH",
            file=sys.stderr,
        )
    if dry:
        for planned in runs:
            print(f"{planned.name}: {'finished' if _is_finished(planned) else 'to do'}")
        return 0
    lock = study_lock(Path(study.runs))
    try:
        return _run_all(study, runs)
    finally:
        lock.release()


def study_lock(runs: Path) -> FolderLock:
    """Keeps a second study out of the folder `runs`. Not by the lock of that folder itself: its
    tracker takes that one when it makes its tables."""
    folder = runs / ".study"
    folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder)


def _run_all(study: Study, runs: Sequence[PlannedRun]) -> int:
    results = Path(study.results)
    failed: dict[str, str] = {}
    with Child(launcher_words(study)) as child:
        for number, planned in enumerate(runs, 1):
            _say(f"{planned.name} ({number} of {len(runs)})")
            was_finished = _is_finished(planned)
            problem = _run_one(child, planned, runs)
            if child.asked:
                _say("stopped; the same command resumes")
                return STOPPED
            problem = problem or _collect(planned, runs, results, again=not was_finished)
            if problem:
                failed[planned.name] = problem
                _say(f"{planned.name} FAILED: {problem}")
    if (results / "cases.csv").exists():
        print(f"tables   {write_tables(results)}")
    for name, problem in failed.items():
        print(f"cldf: error: {name}: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(child: Child, planned: PlannedRun, runs: Sequence[PlannedRun]) -> str:
    """Finish one run; what went wrong, or nothing. A finished run is only compared with what is
    asked for."""
    try:
        if _is_finished(planned):
            return _changed(planned)
        for source in _sources(planned, runs):
            if shared := share_finished_stages(source.config, planned.config):
                _say(f"{planned.name}: takes over {', '.join(shared)} of {source.name}")
    except (ValueError, OSError) as error:
        return str(error)
    if planned.variant != BASE and not any(map(_is_finished, _sources(planned, runs))):
        return "the run that it varies is not finished"
    code: int | None = None
    others = wait_for_others(planned.config.run_folder, child)
    while not (child.asked or _is_finished(planned)):
        if code is not None and not others:
            return f"exit code {code}, its reason is above; the same command tries again"
        code = child.run(["run", *planned.words])
        # where only the launcher was killed, its processes may still be at work
        others = wait_for_others(planned.config.run_folder, child)
    return ""


def _sources(planned: PlannedRun, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that may have made stages of this one: the run it varies, or an earlier training,
    for the prepared data."""
    of_experiment = [
        run for run in runs if (run.experiment, run.variant) == (planned.experiment, BASE)
    ]
    if planned.variant != BASE:
        return [run for run in of_experiment if run.seed == planned.seed]
    return [run for run in of_experiment if run.seed != planned.seed]


def _is_finished(planned: PlannedRun) -> bool:
    return all((planned.config.run_folder / stage.name / DONE).is_file() for stage in STAGES)


def _changed(planned: PlannedRun) -> str:
    """How a finished run differs from what the study asks for now."""
    for stage in STAGES:
        folder = planned.config.run_folder / stage.name
        made_with = read_config(folder / "config.yaml")
        if changed := changed_keys(made_with, planned.config, stage.all_sections):
            return (
                f"{folder} was made with {'; '.join(changed[:3])}; restore the setting, take "
                "other runs=FOLDER and results=FOLDER, or delete that folder and those of the "
                "stages after it"
            )
    return ""


def _collect(planned: PlannedRun, runs: Sequence[PlannedRun], results: Path, *, again: bool) -> str:
    """Put the numbers of a finished run into the results, and make the tables anew; what went
    wrong, or nothing. Pictures are drawn of an experiment's first run, `again` if they exist."""
    first = next(run for run in runs if run.experiment == planned.experiment)
    try:
        merge_rows_of(planned.key, planned.config.run_folder, results)
        there = all((results / name).is_file() for name in picture_names(planned.experiment))
        if planned.key == first.key and (again or not there):
            from cldf_dist.study.pictures import draw_patients  # imports torch

            draw_patients(planned.experiment, planned.config, results)
        write_tables(results)
    except (ValueError, OSError, KeyError) as error:
        return f"its results cannot be read: {error!r}"
    return ""


def _say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr, flush=True)
