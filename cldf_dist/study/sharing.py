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
    """Give the run `target` the finished stages of the run `source` that its settings would make
    the same; their names.

    The folders hold hard links: the trained nets are the same files, with the same identity, and
    nothing writes into a finished stage. A stage that `target` has begun stays its own.
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
    """The first stage that `target` would take over from `source`, but has made itself; "" where
    there is none."""
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
    # `changed_keys` leaves them to `prepare`, which compares their contents
    theirs, ours = flatten(source), flatten(target)
    same_files = all(theirs[key] == ours[key] for key in marked(Config, Mark.FROM_CONFIG_FILE))
    made_with = read_config(folder / "config.yaml")
    return same_files and not changed_keys(made_with, target, stage.all_sections)


def _is_linked(source: Path, target: Path) -> bool:
    """True where a stage was taken over before: its identity is the same."""
    one, other = source / "run.json", target / "run.json"
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _link_folder(source: Path, target: Path) -> None:
    """All files of a folder under another name, whole or not at all; copies where the file system
    has no hard links."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # of a study that was killed here
        shutil.rmtree(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=_link, ignore=shutil.ignore_patterns(NOT_SHARED))
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
