"""MLflow's mirror of metrics.jsonl: one run for the experiment, one nested run a stage.

Only the main process writes, in batches. An outage is announced once and never stops training.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cldf_dist import config as configuration
from cldf_dist.config import Config

BATCH = 500  # metric values per request: MLflow accepts up to 1000
SECONDS_BETWEEN_BATCHES = 30.0


class Tracker:
    """Mirrors one stage; does nothing where `tracking.enabled` is false or the server is away."""

    def __init__(self, config: Config, folder: Path, stage: str) -> None:
        self._client: Any = None
        self._pending: list[Any] = []
        self._last_sent = time.monotonic()
        self._high_water: dict[str, int] = {}
        if config.tracking.enabled:
            self._guarded(lambda: self._open(config, folder, stage))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [
            Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if step > self._high_water.get(name, -1)
        ]
        late = time.monotonic() - self._last_sent > SECONDS_BETWEEN_BATCHES
        if late or len(self._pending) >= BATCH:
            self._guarded(self._send)

    def close(self, status: str) -> None:
        if self._client is None:
            return
        self._guarded(lambda: self._end(status))
        self._client = None

    def _end(self, status: str) -> None:
        self._send()
        self._client.set_terminated(self._run, status)
        self._client.set_terminated(self._parent, status)

    def _open(self, config: Config, folder: Path, stage: str) -> None:
        # a dead server must not hold up training for MLflow's default of five minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # not the table-by-table set-up
        logging.getLogger("alembic").setLevel(logging.WARNING)
        runs = Path(config.runs).resolve()
        client = MlflowClient(tracking_uri=config.tracking.uri or f"sqlite:///{runs}/mlflow.db")
        known = client.get_experiment_by_name(config.tracking.experiment)
        experiment = (
            known.experiment_id
            if known
            else client.create_experiment(
                config.tracking.experiment,
                artifact_location=None if config.tracking.uri else (runs / "mlflow").as_uri(),
            )
        )
        parent = _kept_run(client, experiment, folder.parent / "tracking.json", config.name, {})
        self._parent = parent
        tags = {"mlflow.parentRunId": parent, "stage": stage}
        self._run = _kept_run(client, experiment, folder / "tracking.json", stage, tags)
        self._high_water = _last_steps(client, self._run)
        _log_parameters(client, self._run, configuration.flatten(config))
        self._client = client

    def _send(self) -> None:
        self._last_sent = time.monotonic()
        while self._pending:
            self._client.log_batch(self._run, metrics=self._pending[:BATCH])
            del self._pending[:BATCH]

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever the tracking server does, training goes on
            self._client = None
            reason = " ".join(str(error).split())[:200]
            print(
                f"warning: MLflow is out of reach ({reason}); metrics.jsonl still holds "
                "everything. tracking.enabled=false silences this",
                file=sys.stderr,
            )


def _kept_run(client: Any, experiment: str, path: Path, name: str, tags: dict[str, str]) -> str:
    """The run whose id `path` remembers, set to running again; made where there is none."""
    from mlflow.exceptions import MlflowException

    if path.exists():
        run_id = str(json.loads(path.read_text())["run_id"])
        try:
            client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException:
            pass  # another server, or deleted there: start anew
    run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    path.write_text(json.dumps({"run_id": run_id}))
    return run_id


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    names = client.get_run(run_id).data.metrics
    return {
        name: max(entry.step for entry in client.get_metric_history(run_id, name)) for name in names
    }


def _log_parameters(client: Any, run_id: str, parameters: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(key, str(value)[:500]) for key, value in parameters.items() if key not in known]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
