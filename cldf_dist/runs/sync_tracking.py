"""`cldf sync-tracking`: bring an MLflow store up to date with all stage folders of some runs.

It sends what trainings on nodes without a server, or during an outage, could not. It can be killed
and repeated, also while trainings write: the next time sends the rest. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cldf_dist.config import Config, load
from cldf_dist.runs.run import read_config, read_json
from cldf_dist.runs.tracking import StageSender, start_time, status_of
from cldf_dist.runs.tracking_store import FILE, connect, is_deleted, sqlite_path, sqlite_uri
from cldf_dist.system.locks import FolderLock

STATUSES = ("RUNNING", "KILLED", "FINISHED")  # a run has the first that one of its stages has
SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql")


@dataclass
class Counts:
    """Counts of what was sent and of what was there already."""

    runs: int = 0
    runs_there: int = 0
    runs_deleted: int = 0
    parameters: int = 0
    values: int = 0
    values_there: int = 0
    damaged: list[str] = field(default_factory=list)  # what is wrong with which stage folder

    def __str__(self) -> str:
        deleted = f", {self.runs_deleted} deleted there and left out" if self.runs_deleted else ""
        return (
            f"runs           {self.runs} sent, {self.runs_there} there already{deleted}\n"
            f"parameters     {self.parameters} sent\n"
            f"metric values  {self.values} sent, {self.values_there} there already"
        )


def run(words: Sequence[str]) -> int:
    """Do what the command line says; the exit code. ValueError and OSError say what is wrong."""
    config, target = _parse(words)
    print(f"{config.runs} to {target}")
    counts = sync(Path(config.runs), target)
    print(counts)
    for sentence in counts.damaged:
        print(f"cldf: error: {sentence}", file=sys.stderr)
    return 1 if counts.damaged else 0


def sync(runs: Path, target: str) -> Counts:
    """Send what the stage folders below `runs` hold and the store at `target` lacks."""
    counts = Counts()
    stages = _stages_below(runs, counts.damaged)
    if not stages and not counts.damaged:
        raise FileNotFoundError(f"no stage of a run below {runs}; name its folder with runs=FOLDER")
    lock_folder = runs / ".sync-tracking"
    lock_folder.mkdir(exist_ok=True)
    parents: dict[str, list[tuple[StageSender, str]]] = {}  # the status of each stage
    with FolderLock(lock_folder, remedy="sync another folder of runs"), _errors_with(target):
        client = connect(target, runs)
        for folder, config in stages:
            sender = StageSender(client, runs, folder, config)
            counts.runs += sender.num_created
            counts.parameters += sender.num_parameters
            status = status_of(folder, at_work=_is_at_work(folder))
            parents.setdefault(sender.parent.info.run_id, []).append((sender, status))
            if is_deleted(sender.run):
                counts.runs_deleted += 1
                continue
            sent, known = sender.send_values()
            counts.values += sent
            counts.values_there += known
            sender.set_status(sender.run, status)
        for parts in parents.values():
            last = parts[-1][0]
            last.set_status(last.parent, min((part[1] for part in parts), key=STATUSES.index))
            counts.runs_deleted += is_deleted(last.parent)
    num_runs = len(stages) + len(parents)
    counts.runs_there = num_runs - counts.runs - counts.runs_deleted
    return counts


def _parse(words: Sequence[str]) -> tuple[Config, str]:
    """The settings, and the URI of the store."""
    settings = [word for word in words if "=" in word and not word.startswith("to=")]
    files = [word for word in words if "=" not in word]
    if not files:
        settings.insert(0, "data.dataset=phantom")  # no data is read
    config = load(files, settings)
    to = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    target = to[-1] if to else config.tracking.uri or sqlite_uri(Path(config.runs) / FILE)
    if not target.startswith(SCHEMES):
        raise ValueError(f"to must be http://HOST:PORT or sqlite:///FILE, got {target!r}")
    path = sqlite_path(target)
    return config, sqlite_uri(path) if path else target.rstrip("/")


def _stages_below(runs: Path, damaged: list[str]) -> list[tuple[Path, Config]]:
    """The folders of stages that have begun, oldest first, with their settings.

    One that cannot be read is left out, and told in `damaged`. A stage that several runs of a
    study share is there once.
    """
    found: dict[str, tuple[int, Path, Config]] = {}
    for folder in sorted(_stage_folders(runs)):
        try:
            identity = read_json(folder / "run.json")["id"]
            found.setdefault(
                identity, (start_time(folder), folder, read_config(folder / "config.yaml"))
            )
        except (ValueError, KeyError, OSError) as error:
            damaged.append(f"{folder} is left out: {error}")
    return [(folder, config) for _, folder, config in sorted(found.values(), key=lambda f: f[:2])]


def _stage_folders(runs: Path) -> Iterator[Path]:
    """Of a stage's own folders only those with further stages in them are looked into."""
    for place, subfolders, files in os.walk(runs, followlinks=True):
        folder = Path(place)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and (
                "run.json" not in files or name == "parts" or (folder / name / "run.json").exists()
            )
        ]
        if "provenance.json" in files:  # the last that a start writes
            yield folder


def _is_at_work(folder: Path) -> bool:
    try:
        FolderLock(folder).release()
    except RuntimeError:
        return True
    return False


@contextmanager
def _errors_with(uri: str) -> Iterator[None]:
    """Turns MLflow's errors, which have no common class, into an OSError with the address."""
    try:
        yield
    except (ValueError, OSError, RuntimeError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConnectionError(
            f"MLflow at {uri} is out of reach or refuses ({reason}); what was sent is kept, and "
            "the same command goes on"
        ) from error
