"""MLflow at one address: the run of a given identity, found or made; the points that it lacks.

Run ids are the server's; our own identity of a run is its tag `cldf.run`, the same in every store.
So the same stage can be written to a file today and to a server tomorrow, and is one run in each.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from cldf_dist.system.locks import FolderLock

FILE = "mlflow.db"
IDENTITY, FOLDER, OPENED = "cldf.run", "cldf.folder", "cldf.opened"
PARENT = "mlflow.parentRunId"
BATCH = 500  # metric values per request: MLflow accepts up to 1000
LOCK_SECONDS = 60.0  # making the tables of a store takes seconds, of those who wait too
BUSY_SECONDS = 20.0
TRY_SECONDS = 0.05, 0.4  # between two tries for the lock, at first and at last


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float
    milliseconds: int  # since 1970


Steps = dict[str, set[int]]  # the steps of each metric


def sqlite_uri(path: Path) -> str:
    return f"sqlite:///{path.resolve()}"


def sqlite_path(uri: str) -> Path | None:
    """The file that a sqlite URI names; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def prepare_mlflow(uri: str) -> None:
    """Import what a store at `uri` needs; it is quiet, and gives a dead server up in seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # not for five minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.tracking

    if uri.startswith("sqlite:"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # not the table-by-table set-up
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # we say what failed
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def client_of(uri: str, guard: Callable[[], AbstractContextManager[None]] = nullcontext) -> Any:
    """A client of the store at `uri`, which has answered. A file is made with its tables, whole or
    not at all, within `guard`. Raises what MLflow or sqlite3 raise where the store is no good."""
    from mlflow.tracking import MlflowClient

    path = sqlite_path(uri)
    if path is not None and not path.exists():
        with guard():
            if not path.exists():
                _make_tables(path)
    if path is not None:
        _check_writable(path)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _make_tables(path: Path) -> None:
    """MLflow's tables take seconds to make, and a file that has some of them is of no use."""
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _check_writable(partial)
        MlflowClient(tracking_uri=sqlite_uri(partial)).search_experiments(max_results=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_writable(path: Path) -> None:
    """Raise sqlite3.Error where SQLite cannot write or lock that file: MLflow 3.17 tries such a
    one for 100 seconds."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


@contextmanager
def alone(folder: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """While nobody else, on any machine, is in here for `folder`; RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    pause, longest = TRY_SECONDS
    while True:
        try:
            lock = FolderLock(folder)
            break
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, longest)
    try:
        yield
    finally:
        lock.release()


def experiment_in(client: Any, name: str, artifacts: Path | None = None) -> str:
    """The id of the experiment of that name, made where there is none."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known is None:
        location = artifacts.resolve().as_uri() if artifacts else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            known = client.get_experiment_by_name(name)  # somebody was faster
            if known is None:
                raise
    if known.lifecycle_stage == "deleted":
        raise ValueError(f"the experiment {name} was deleted there; restore it, or take another")
    return str(known.experiment_id)


def run_of(client: Any, experiment: str, identity: str, *, deleted: bool = False) -> Any:
    """The oldest run with that identity, or None; deleted ones too where `deleted`."""
    from mlflow.entities import ViewType

    found = client.search_runs(
        [experiment],
        f"tags.`{IDENTITY}` = '{identity}'",
        run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
        order_by=["attributes.start_time ASC"],
    )
    living = [run for run in found if run.info.lifecycle_stage == "active"]
    return next(iter(living or found), None)


def set_tags(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Set the tags that differ."""
    for key, value in tags.items():
        if run.data.tags.get(key) != value:
            client.set_tag(run.info.run_id, key, value)


def known_steps(client: Any, run_id: str) -> Steps:
    """The steps of every metric of a run."""
    return {
        name: {entry.step for entry in client.get_metric_history(run_id, name)}
        for name in client.get_run(run_id).data.metrics
    }


def send_points(client: Any, run_id: str, points: Sequence[Point], known: Steps) -> int:
    """Send the points that are not `known` yet, which then are; their number."""
    from mlflow.entities import Metric

    new: dict[tuple[str, int], Point] = {}
    for point in points:
        if point.step not in known.get(point.name, ()):
            new.setdefault((point.name, point.step), point)
    ready = list(new.values())
    for start in range(0, len(ready), BATCH):
        batch = ready[start : start + BATCH]
        metrics = [Metric(name, value, when, step) for name, step, value, when in batch]
        client.log_batch(run_id, metrics=metrics)
        for point in batch:
            known.setdefault(point.name, set()).add(point.step)
    return len(ready)


def send_parameters(client: Any, run: Any, parameters: Mapping[str, Any]) -> int:
    """Send the parameters that the run has no value of (MLflow lets none change); their number."""
    from mlflow.entities import Param

    known = run.data.params
    new = [Param(key, str(value)[:500]) for key, value in parameters.items() if key not in known]
    for start in range(0, len(new), 100):
        client.log_batch(run.info.run_id, params=new[start : start + 100])
    return len(new)


def read_points(path: Path, offset: int = 0) -> tuple[list[Point], int]:
    """The points of the whole lines of a metrics.jsonl from byte `offset` on, and where they end.

    A line that was cut short by a kill holds none.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    points = [point for line in whole.splitlines() for point in _points_of(line)]
    return points, offset + len(whole)


def _points_of(line: bytes) -> list[Point]:
    try:
        said = json.loads(line)
        step, when = int(said.pop("step")), round(1000 * said.pop("time"))
        return [Point(name, step, float(value), when) for name, value in said.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
