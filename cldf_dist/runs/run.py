"""The folder of one stage of a run: lock, provenance, metrics, and the file that says that it is
finished.

`runs/<name>/<stage>/` holds config.yaml, provenance.json, metrics.jsonl, checkpoints/, the stage's
outputs and, last, DONE. metrics.jsonl is the truth about the numbers; MLflow mirrors it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cldf_dist import config as configuration
from cldf_dist.config import Config, Mark, marked
from cldf_dist.runs.provenance import devices, git_state, versions
from cldf_dist.runs.tracking import Mirror
from cldf_dist.system.distributed import processes
from cldf_dist.system.files import atomic_write
from cldf_dist.system.locks import FolderLock

DONE = "DONE"
BOOKKEEPING = (  # what a stage's folder holds before there is any result
    ".attempt.json", ".lock", "config.yaml", "provenance.json", "run.json", "seconds.json",
)  # fmt: skip
LOCK_SECONDS = (
    0.5  # `cldf sync-tracking` and a study take the lock for a moment, to see if it is free
)
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the limit of the file system or of ulimit -f",
}


class Run:
    """One stage of one run, as seen by one process; only the main process writes."""

    def __init__(
        self, config: Config, stage: str, sections: Sequence[str], inputs: Sequence[str] = ()
    ) -> None:
        self.config, self.stage, self.sections = config, stage, tuple(sections)
        self.inputs = tuple(inputs)  # the stages whose outputs this one reads
        self.folder = config.run_folder / stage
        self.is_main = processes().is_main
        self.stop_requested = 0  # the signal that asked for a stop, if the stage finished anyway
        self._lock: FolderLock | None = None
        self._metrics: IO[str] | None = None
        self._mirror: Mirror | None = None
        self._started = time.time()

    @property
    def id(self) -> str:
        """Identifies this stage folder for good: a checkpoint of another run is not ours."""
        return str(read_json(self.folder / "run.json")["id"])

    @property
    def is_finished(self) -> bool:
        """True if the stage has finished."""
        return (self.folder / DONE).is_file()

    def needs(self, stage: str) -> Path:
        """The folder of a finished earlier stage; FileNotFoundError says how to make it."""
        folder = self.config.run_folder / stage
        if not (folder / DONE).is_file():
            raise FileNotFoundError(f"{folder} is not finished; run: {command_for(stage)}")
        return folder

    def open(self) -> None:
        """Take the stage folder (main process only): lock it, check it, write what is known."""
        with room_explained(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(self.folder, wait_seconds=LOCK_SECONDS)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise
                raise OSError(
                    f"cannot write the run folder {self.folder}: {error.strerror}; choose another "
                    "with runs=FOLDER"
                ) from error
            try:
                self._start()
            except BaseException:
                self.close()
                raise

    def _start(self) -> None:
        self.check_unchanged()
        seconds_of(self.folder)  # a damaged file is told now, not when the work is done
        identity = self.folder / "run.json"
        if not identity.exists():
            about = {"id": uuid.uuid4().hex, "stage": self.stage, "inputs": self.input_ids()}
            write_atomically(identity, json.dumps(about))
        write_atomically(self.folder / "config.yaml", configuration.to_yaml(self.config))
        write_atomically(self.folder / "provenance.json", json.dumps(self._provenance(), indent=1))
        self._metrics = (self.folder / "metrics.jsonl").open("a")
        self._mirror = Mirror(self.config, self.folder)

    def start_logging_from(self, step: int, *, again: str = "") -> None:
        """Cut metrics.jsonl back to the checkpoint's step: what came later is done again.

        Lines of that step go too where they hold names that begin with `again`, if it is given.
        """
        if self._metrics is None:
            return
        self._metrics.close()
        path = self.folder / "metrics.jsonl"
        kept = [
            line
            for line in path.read_text().splitlines()
            if _step_of(line) in range(step + 1)
            and not (again and _step_of(line) == step and f'"{again}' in line)
        ]
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._metrics = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and mirror it; other ranks are silent."""
        if self._metrics is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._mirror is not None:
            self._mirror.allow_values()

    def finish(self, outputs: Mapping[str, Any] | None = None) -> None:
        """Declare the stage finished; `outputs` (numbers worth keeping) go into DONE."""
        if self._metrics is None:
            return
        self._add_seconds()
        word = {"stage": self.stage, "finished": round(time.time(), 3), **(outputs or {})}
        write_atomically(self.folder / DONE, json.dumps(word, indent=1))
        self.close()

    def close(self) -> None:
        """Let the folder go; without `finish` the stage counts as interrupted."""
        if self._metrics is not None:
            if not self.is_finished:
                with suppress(OSError):  # what stopped the stage is the news
                    self._add_seconds()
            with suppress(OSError):  # every line was flushed when it was logged
                self._metrics.close()
            self._metrics = None
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _add_seconds(self) -> None:
        seconds = seconds_of(self.folder) + time.time() - self._started
        self._started = time.time()
        write_atomically(self.folder / "seconds.json", json.dumps({"seconds": round(seconds, 2)}))

    def check_unchanged(self) -> None:
        """Raise ValueError where the folder holds work of other settings or of other inputs."""
        identity = self.folder / "run.json"
        if not (self.folder / "config.yaml").exists() or not identity.exists():
            return
        made_from = read_json(identity).get("inputs", {})
        for name, current in self.input_ids().items():
            if made_from.get(name, current) != current:
                raise ValueError(
                    f"{self.folder} was made from another {name} than the one there is now; delete "
                    f"{self.folder} and the folders of the stages after it, and run them again"
                )
        changed = self._changed_keys()
        if changed and not self._is_untouched():
            raise ValueError(
                f"{self.folder} was made with {'; '.join(changed[:3])}; take another name=..., "
                "restore the setting, or delete that folder and those of the stages after it"
            )

    def _changed_keys(self) -> list[str]:
        path = self.folder / "config.yaml"
        if not path.exists():
            return []
        return changed_keys(read_config(path), self.config, self.sections)

    def _is_untouched(self) -> bool:
        """True where nothing was computed yet: the first command may have been wrong."""
        files = (file for file in self.folder.rglob("*") if not file.is_dir())
        return all(file.name in BOOKKEEPING or not file.stat().st_size for file in files)

    def input_ids(self) -> dict[str, str]:
        """The identities of the stages whose outputs this one reads."""
        files = {name: self.config.run_folder / name / "run.json" for name in self.inputs}
        return {name: str(read_json(path)["id"]) for name, path in files.items() if path.exists()}

    def _digests_of_inputs(self) -> dict[str, str]:
        files = {name: self.config.run_folder / name / DONE for name in self.inputs}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in files.items()
            if path.exists()
        }

    def _provenance(self) -> dict[str, Any]:
        previous = self.folder / "provenance.json"
        starts = read_json(previous)["starts"] if previous.exists() else []
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "git": git_state(),
            "host": socket.gethostname(),
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
            "processes": processes().world_size,
            "versions": versions(),
            "devices": devices(),
            "seed": self.config.seed,
            "inputs": self._digests_of_inputs(),
        }
        return {"starts": [*starts, start]}


def command_for(stage: str) -> str:
    """The command line that makes `stage`, with this process's config files and settings."""
    given = sys.argv[2:]
    if any(word.startswith("input=") for word in given):
        stage = "run"  # new scans need a whole finished run
    own = ("--", "input=", "output=", "fit.")  # words for this command alone
    return shlex.join(["cldf", stage, *(word for word in given if not word.startswith(own))])


def read_config(path: Path) -> Config:
    """The resolved configuration that a stage folder holds."""
    from omegaconf import OmegaConf

    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path))
        return configuration.from_plain(plain)
    except Exception as error:  # OmegaConf's and YAML's errors have no common kind
        raise ValueError(
            f"{path} is damaged or of another version: {' '.join(str(error).split())}; take "
            f"another name=..., or delete {path.parent} and run that stage again"
        ) from error


def changed_keys(old: Config, new: Config, sections: Sequence[str]) -> list[str]:
    """`key=old value, not new value` for each setting in `sections` that matters and differs."""
    before, after = configuration.flatten(old), configuration.flatten(new)
    harmless = marked(Config, Mark.HARMLESS)

    def is_off(section: str) -> bool:  # before and now: the rest of it does not matter
        return not (before.get(f"{section}.enabled", True) or after.get(f"{section}.enabled", True))

    return [
        f"{key}={before[key]!r}, not {after[key]!r}"
        for key in before
        if before[key] != after.get(key)
        and (key in sections or key.split(".")[0] in sections)
        and key not in harmless
        and not is_off(key.split(".")[0])
    ]


def seconds_of(folder: Path) -> float:
    """Wall time spent in a stage so far, over all its starts."""
    path = folder / "seconds.json"
    return float(read_json(path)["seconds"]) if path.exists() else 0.0


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a stage folder; ValueError, with the file, if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; delete {path.parent} and run that stage again"
        ) from error
    return content


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old or the new whole."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def room_explained(folder: Path) -> Iterator[None]:
    """An OSError for want of room on the disk becomes one that says where, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"cannot write {error.filename or folder}: {NO_ROOM[error.errno]}; make room, then the "
            "same command resumes, or take another disk with runs=FOLDER"
        ) from error


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # a line cut short by a kill
