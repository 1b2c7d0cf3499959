"""MLflow as a mirror of metrics.jsonl: one run for the experiment, one nested run per stage.

A stage's folder holds all that is sent: run.json (identity), config.yaml (parameters),
provenance.json (tags), metrics.jsonl (values) and DONE (status). So a store can be brought up to
date at any time, from any process, and as often as needed: only what it lacks is sent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cldf_dist import config as configuration
from cldf_dist.config import Config
from cldf_dist.runs import tracking_store as store
from cldf_dist.system.files import atomic_write
from cldf_dist.system.locks import FolderLock

PARENT = "mlflow.parentRunId"
BATCH = 500  # metric values per request: MLflow accepts up to 1000
SECONDS_BETWEEN_SENDS = 30.0
SECONDS_TO_CLOSE = 60.0  # that the end of a stage waits for its last values to be sent


class Mirror:
    """Sends a stage's values from a background thread; a store that is away never stops training.

    Does nothing where `tracking.enabled` is false.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._closing = threading.Event()
        self._values_settled = self._has_warned = False
        self._thread: threading.Thread | None = None
        if not config.tracking.enabled:
            return
        uri = store_uri(config)
        try:
            if not uri:
                raise ConnectionError("a SLURM job needs tracking.uri=http://HOST:PORT")
            store.import_mlflow(uri)  # not in the thread: imports of two threads can deadlock
        except Exception as error:
            self._warn(error)
            return
        self._thread = threading.Thread(target=self._keep_sending, args=(uri,), daemon=True)
        self._thread.start()

    def allow_values(self) -> None:
        """Values may be sent from now on: lines that will be computed again have been removed."""
        self._values_settled = True

    def close(self) -> None:
        """Send the rest and the status, or give up after `SECONDS_TO_CLOSE`."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"no end after {SECONDS_TO_CLOSE:.0f} s"))
        self._thread = None

    def _keep_sending(self, uri: str) -> None:
        sender: StageSender | None = None
        last = False
        while not last:
            last, is_new = self._closing.is_set(), sender is None
            try:
                if sender is None:
                    runs = Path(self._config.runs)
                    client = store.connect(uri, runs)
                    sender = StageSender(
                        client, runs, self._folder, self._config, replace_deleted=True
                    )
                status = status_of(self._folder, at_work=not last)
                if self._values_settled or status == "FINISHED":
                    sender.send_values()
                sender.set_status(sender.run, status)
                sender.set_status(sender.parent, status)
            except Exception as error:  # MLflow's and the network's have no common kind
                sender = None
                last = last and is_new  # a server that was restarted deserves a second try
                self._warn(error)
            if not last:
                self._closing.wait(SECONDS_BETWEEN_SENDS)

    def _warn(self, error: Exception) -> None:
        """Print one warning a stage, however often a store fails."""
        if self._has_warned:
            return
        self._has_warned = True
        reason = " ".join(str(error).split())[:200]
        to = f"to={self._config.tracking.uri} " if self._config.tracking.uri else ""
        print(
            f"warning: MLflow is out of reach ({reason}); metrics.jsonl holds everything, and "
            f"cldf sync-tracking {to}runs={self._config.runs} sends what is missing later; "
            "tracking.enabled=false silences this",
            file=sys.stderr,
        )


class StageSender:
    """Finds or creates the MLflow runs of a stage and of its experiment, and sends what they lack.

    A run that was deleted in the store is left alone, or replaced where `replace_deleted`.
    `num_created` and `num_parameters` count what was new. Raises what MLflow raises.
    """

    def __init__(
        self,
        client: Any,
        runs: Path,
        folder: Path,
        config: Config,
        *,
        replace_deleted: bool = False,
    ) -> None:
        self._client, self._folder = client, folder
        self._known: dict[str, set[int]] | None = None  # the steps of each metric in the store
        self._inode = self._offset = 0  # what has been read of metrics.jsonl
        self.num_created = self.num_parameters = 0
        about = _read(folder / "run.json")
        with FolderLock(runs, wait_seconds=store.LOCK_SECONDS):  # of stages that start at once
            experiment = store.experiment_named(client, config.tracking.experiment, runs)

            def find_or_create(name: str, tags: dict[str, str]) -> Any:
                run = store.find_run(client, experiment, tags[store.IDENTITY])
                if run is not None and not (replace_deleted and store.is_deleted(run)):
                    return run
                self.num_created += 1
                return client.create_run(experiment, start_time(folder), tags, run_name=name)

            self.parent = find_or_create(
                config.name, {store.IDENTITY: _id_of_run(runs / config.name)}
            )
            nested = {PARENT: self.parent.info.run_id, "stage": about["stage"]}
            self.run = find_or_create(about["stage"], {store.IDENTITY: about["id"], **nested})
        self._statuses = {run.info.run_id: run.info.status for run in (self.parent, self.run)}
        if not store.is_deleted(self.run):
            self._send_parameters(configuration.flatten(config), nested)

    def send_values(self) -> tuple[int, int]:
        """Send the values of metrics.jsonl that the store lacks; how many, and how many it had.

        A step that was sent and is computed again keeps its first value: MLflow replaces none.
        """
        run_id = self.run.info.run_id
        if self._known is None:
            self._known = {
                name: {point.step for point in self._client.get_metric_history(run_id, name)}
                for name in self._client.get_run(run_id).data.metrics
            }
        points = self._new_points()
        missing = {
            (point.key, point.step): point
            for point in reversed(points)  # of two values of one step the first
            if point.step not in self._known.get(point.key, ())
        }
        ready = list(reversed(missing.values()))
        for start in range(0, len(ready), BATCH):
            batch = ready[start : start + BATCH]
            self._client.log_batch(run_id, metrics=batch)
            for point in batch:
                self._known.setdefault(point.key, set()).add(point.step)
        return len(ready), len(points) - len(ready)

    def set_status(self, run: Any, status: str) -> None:
        """Set the status of `run` or `parent` where it differs, with the time of its end."""
        run_id = run.info.run_id
        if status == self._statuses[run_id] or store.is_deleted(run):
            return
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status, _end_time(self._folder))
        self._statuses[run_id] = status

    def _new_points(self) -> list[Any]:
        """The values of the lines that metrics.jsonl has had since the last call, and of all lines
        where it was replaced, as it is when it is cut back."""
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return []
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a kill can threshold the last line short
        self._offset += len(whole)
        return [point for line in whole.splitlines() for point in _points_of(line)]

    def _send_parameters(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Send tags, and the parameters that have no value there: MLflow lets none change."""
        from mlflow.entities import Param, RunTag

        known = self.run.data.params
        new = [
            Param(key, str(value)[:500]) for key, value in parameters.items() if key not in known
        ]
        all_tags = {**tags, **_tags_of_starts(self._folder)}
        run_tags = [RunTag(key, value) for key, value in all_tags.items()]
        for start in range(0, max(len(new), 1), 100):  # MLflow accepts up to 100
            part = new[start : start + 100]
            self._client.log_batch(self.run.info.run_id, params=part, tags=run_tags)
        self.num_parameters = len(new)


def store_uri(config: Config) -> str:
    """The store of `tracking.uri`, or else a file in the folder of runs; "" in a SLURM job without
    `tracking.uri`: SQLite is not for several machines at once."""
    if config.tracking.uri or os.environ.get("SLURM_JOB_ID"):
        return config.tracking.uri
    return store.sqlite_uri(Path(config.runs) / store.FILE)


def status_of(folder: Path, *, at_work: bool) -> str:
    """The state of a stage as MLflow names it."""
    if (folder / "DONE").is_file():
        return "FINISHED"
    return "RUNNING" if at_work else "KILLED"


def start_time(folder: Path) -> int:
    """When a stage was first started, in milliseconds since 1970."""
    first = datetime.fromisoformat(_read(folder / "provenance.json")["starts"][0]["time"])
    return round(1000 * first.timestamp())


def _end_time(folder: Path) -> int:
    """When a stage was finished or, where it is not, last logged, in milliseconds since 1970."""
    if (folder / "DONE").is_file():
        return round(1000 * float(_read(folder / "DONE")["finished"]))
    files = [folder / name for name in ("metrics.jsonl", "provenance.json")]
    return round(1000 * max(file.stat().st_mtime for file in files if file.exists()))


def _points_of(line: bytes) -> list[Any]:
    """MLflow's metrics for the values of one line; none where it is damaged."""
    from mlflow.entities import Metric

    try:
        values = json.loads(line)
        step, when = int(values.pop("step")), round(1000 * values.pop("time"))
        return [Metric(name, float(value), when, step) for name, value in values.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _id_of_run(folder: Path) -> str:
    """The identity of a whole run, which its first stage decides; the caller holds a lock."""
    path = folder / "tracking.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps({"id": uuid.uuid4().hex}).encode())
    return str(_read(path)["id"])


def _tags_of_starts(folder: Path) -> dict[str, str]:
    """The number of starts of the stage, and the SLURM jobs that made them."""
    starts = _read(folder / "provenance.json")["starts"]
    jobs = dict.fromkeys(start["slurm_job"] for start in starts if start["slurm_job"])
    tags = {"cldf.starts": str(len(starts))}
    return {**tags, "slurm.jobs": ",".join(jobs)} if jobs else tags


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
