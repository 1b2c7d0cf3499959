"""MLflow's mirror of metrics.jsonl: one run for the experiment, one nested run a stage.

Only the main process writes, in batches, and what it sends it reads from metrics.jsonl: so nothing
is missing after a kill, and nothing is sent twice. Where the server is away the stage goes on in a
file of its own, which `cldf sync-tracking` replays. Nothing here ever stops training.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cldf_dist import config as configuration
from cldf_dist.config import Config
from cldf_dist.runs import tracking_store as store

SECONDS_BETWEEN_BATCHES = 30.0


class Tracker:
    """Mirrors one stage; does nothing where `tracking.enabled` is false."""

    def __init__(self, config: Config, folder: Path, stage: str) -> None:
        self._config, self._folder, self._stage = config, folder, stage
        self._uris = _addresses(config, folder) if config.tracking.enabled else []
        self._client: Any = None
        self._parent = self._run = ""
        self._known: store.Steps | None = None  # what the store has; None: not asked yet
        self._offset = 0  # what has been sent of metrics.jsonl, in bytes
        self._num_waiting = 0
        self._last_sent = time.monotonic()
        if self._uris:
            self._open()

    def logged(self, num_values: int) -> None:
        """So many values were written to metrics.jsonl; now and then they are sent."""
        self._num_waiting += num_values
        late = time.monotonic() - self._last_sent > SECONDS_BETWEEN_BATCHES
        if self._uris and (late or self._num_waiting >= store.BATCH):
            self._send()

    def rewound(self) -> None:
        """metrics.jsonl was cut back; what was sent and is done again is not sent again."""
        self._offset = 0

    def close(self, status: str) -> None:
        if not self._uris:
            return
        self._send()
        if self._client is not None:
            try:
                self._client.set_terminated(self._run, status)
                self._client.set_terminated(self._parent, status)
            except Exception as error:  # all values are there: not worth another store
                self._warn(error, "only the word that the stage has ended is missing")
        self._uris = []

    def _open(self) -> None:
        self._try(lambda: None)

    def _send(self) -> None:
        self._last_sent = time.monotonic()
        self._try(self._catch_up)

    def _try(self, action: Callable[[], None]) -> None:
        """Do that in the first store that can be had; without any, mirroring ends."""
        while self._uris:
            try:
                if self._client is None:
                    self._enter(self._uris[0])
                action()
                return
            except Exception as error:  # whatever the tracking server does, training goes on
                self._client = None
                self._leave(error)

    def _leave(self, error: Exception) -> None:
        """Go on in the stage's own store; where that is what failed, nowhere."""
        failed = self._uris.pop(0)
        if not self._uris:
            self._warn(
                error, "metrics.jsonl holds everything; tracking.enabled=false silences this"
            )
            return
        to = f"to={failed} " if self._config.tracking.uri else ""
        self._warn(
            error,
            f"{self._stage} goes on in {self._folder / store.FILE}, and "
            f"cldf sync-tracking {to}runs={self._config.runs} sends that later",
        )

    def _warn(self, error: Exception, consequence: str) -> None:
        reason = " ".join(str(error).split())[:200]
        print(f"warning: MLflow is out of reach ({reason}); {consequence}", file=sys.stderr)

    def _catch_up(self) -> None:
        if self._known is None:
            self._known = store.known_steps(self._client, self._run)
        points, end = store.read_points(self._folder / "metrics.jsonl", self._offset)
        store.send_points(self._client, self._run, points, self._known)
        self._offset, self._num_waiting = end, 0

    def _enter(self, uri: str) -> None:
        """Find or make the two runs in the store at `uri`."""
        config = self._config
        runs = Path(config.runs)
        store.prepare_mlflow(uri)
        own = uri == store.sqlite_uri(self._folder / store.FILE)
        guard: Callable[[], AbstractContextManager[None]]
        guard = nullcontext if own else partial(store.alone, runs)
        client = store.client_of(uri, guard)
        with guard():  # of all stages that start at once one makes the parent
            artifacts = None if config.tracking.uri and not own else runs / "mlflow"
            experiment = store.experiment_in(client, config.tracking.experiment, artifacts)
            parent = {store.IDENTITY: _identity_of_parent(config.run_folder)}
            self._parent = _kept_run(client, experiment, config.name, parent).info.run_id
            tags = {
                store.IDENTITY: _identity(self._folder),
                store.FOLDER: f"{config.name}/{self._stage}",
                store.PARENT: self._parent,
                "stage": self._stage,
                **_tags_of_starts(self._folder),
            }
            run = _kept_run(client, experiment, self._stage, tags)
        self._run = run.info.run_id
        store.send_parameters(client, run, configuration.flatten(config))
        self._known, self._offset, self._client = None, 0, client


def local_uri(config: Config) -> str:
    """The file for stages without a server; "" in a SLURM job, where each stage has its own:
    SQLite is not for several machines at once."""
    if os.environ.get("SLURM_JOB_ID"):
        return ""
    return store.sqlite_uri(Path(config.runs) / store.FILE)


def _addresses(config: Config, folder: Path) -> list[str]:
    """Where the stage is tracked, and where instead if that cannot be."""
    first = config.tracking.uri or local_uri(config)
    own = store.sqlite_uri(folder / store.FILE)
    return [first, own] if first else [own]


def _kept_run(client: Any, experiment: str, name: str, tags: dict[str, str]) -> Any:
    """The run with that identity, set to running again; made where there is none."""
    tags = {**tags, store.OPENED: str(round(1000 * time.time()))}
    run = store.run_of(client, experiment, tags[store.IDENTITY])
    if run is None:
        return client.create_run(experiment, run_name=name, tags=tags)
    client.update_run(run.info.run_id, status="RUNNING")
    store.set_tags(client, run, tags)
    return run


def _identity(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["id"])


def _identity_of_parent(folder: Path) -> str:
    """What identifies a whole run: of all stages that start at once the first decides."""
    path = folder / "tracking.json"
    if not path.exists():
        mine = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        mine.write_text(json.dumps({"id": uuid.uuid4().hex}))
        try:
            os.link(mine, path)  # unlike a renaming it never replaces what is there
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            mine.replace(path)
        finally:
            mine.unlink(missing_ok=True)
    return str(json.loads(path.read_text())["id"])


def _tags_of_starts(folder: Path) -> dict[str, str]:
    """How often the stage was started, and by which jobs of SLURM."""
    path = folder / "provenance.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    jobs = dict.fromkeys(start["slurm_job"] for start in starts if start.get("slurm_job"))
    tags = {"cldf.starts": str(len(starts))}
    if jobs:
        tags["slurm.jobs"] = ",".join(jobs)
        tags["slurm.restarts"] = os.environ.get("SLURM_RESTART_COUNT", "0")
    return tags
