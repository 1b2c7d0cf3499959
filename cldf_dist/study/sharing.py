"""Finished stages of one run taken over by another whose settings do not change them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cldf_dist.config import Config, Mark, flatten, marked
from cldf_dist.runs.run import DONE, changed_keys, read_config
from cldf_dist.stages import STAGES, Stage

NOT_SHARED = ".lock"  # its owner writes into it


def share_finished_stages(source: Config, target: Config) -> list[str]:
    """Link the finished stages of the run `source` into the run `target` where its settings would
    give the same result; return their names.

    The folders hold hard links: the trained nets are the same files, with the same identity, and
    nothing writes into a finished stage. A stage that `target` has begun is left as it is.
    """
    same: list[str] = []
    shared = []
    for stage in STAGES:
        if not set(stage.needs) <= set(same) or not _would_be_same(source, target, stage):
            continue
        folder = target.run_folder / stage.name
        if not folder.exists():
            _link_folder(source.run_folder / stage.name, folder)
            shared.append(stage.name)
            same.append(stage.name)
        elif _is_linked(source.run_folder / stage.name, folder):
            same.append(stage.name)
    return shared


def stage_of_its_own(source: Config, target: Config) -> str:
    """The first stage that `target` could share with `source` but has made itself, or ""."""
    same: list[str] = []
    for stage in STAGES:
        if set(stage.needs) <= set(same) and _would_be_same(source, target, stage):
            if not _is_linked(*(run.run_folder / stage.name for run in (source, target))):
                return stage.name
            same.append(stage.name)
    return ""


def _would_be_same(source: Config, target: Config, stage: Stage) -> bool:
    folder = source.run_folder / stage.name
    if not (folder / DONE).is_file():
        return False
    # `changed_keys` skips them, since `prepare` compares their contents
    theirs, ours = flatten(source), flatten(target)
    same_files = all(theirs[key] == ours[key] for key in marked(Config, Mark.FROM_CONFIG_FILE))
    made_with = read_config(folder / "config.yaml")
    return same_files and not changed_keys(made_with, target, stage.all_sections)


def _is_linked(source: Path, target: Path) -> bool:
    """True where both folders hold the same stage, with one identity."""
    one, other = source / "run.json", target / "run.json"
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _link_folder(source: Path, target: Path) -> None:
    """Link all files of a folder into another, in one step; copy them where the file system has no
    hard links."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # left by a study that was killed here
        shutil.rmtree(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=_link, ignore=shutil.ignore_patterns(NOT_SHARED))
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
