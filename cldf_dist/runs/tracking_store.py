"""MLflow stores: a client of the one at an address, and the experiment and runs in it."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from cldf_dist.system.files import atomic_write
from cldf_dist.system.locks import FolderLock

FILE = "mlflow.db"
IDENTITY = "cldf.run"  # a tag: our identity of a run, the same in every store
LOCK_SECONDS = 60.0  # creating the tables of a store takes seconds; other stages wait
BUSY_SECONDS = 20.0


def sqlite_uri(path: Path) -> str:
    """The MLflow URI of a SQLite file."""
    return f"sqlite:///{path.resolve()}"


def sqlite_path(uri: str) -> Path | None:
    """The file that a sqlite URI names; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def import_mlflow(uri: str) -> None:
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


def connect(uri: str, runs: Path) -> Any:
    """A client of the store at `uri`, which has answered; a SQLite file is created if missing.

    Raises what MLflow or sqlite3 raise where the store cannot be used.
    """
    import_mlflow(uri)
    from mlflow.tracking import MlflowClient

    path = sqlite_path(uri)
    if path is not None:
        with FolderLock(runs, wait_seconds=LOCK_SECONDS):
            if not path.exists():
                _create_tables(path)
        _check_writable(path)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


def experiment_named(client: Any, name: str, runs: Path) -> str:
    """The id of the experiment of that name, created where there is none."""
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    is_file = sqlite_path(client.tracking_uri) is not None
    artifacts = (runs / "mlflow").resolve().as_uri() if is_file else None
    return str(client.create_experiment(name, artifact_location=artifacts))


def find_run(client: Any, experiment: str, identity: str) -> Any:
    """The oldest run with that identity, a deleted one only where there is no other, or None."""
    from mlflow.entities import ViewType

    found = client.search_runs(
        [experiment],
        f"tags.`{IDENTITY}` = '{identity}'",
        run_view_type=ViewType.ALL,
        order_by=["attributes.start_time ASC"],
    )
    return next(iter(sorted(found, key=is_deleted)), None)


def is_deleted(run: Any) -> bool:
    """True if an MLflow run is in the store's trash."""
    return bool(run.info.lifecycle_stage == "deleted")


def _create_tables(path: Path) -> None:
    """Create a store, whole or not at all: that takes MLflow seconds, and half a one is no use."""
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / path.name
        MlflowClient(tracking_uri=sqlite_uri(made)).search_experiments(max_results=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(made.read_bytes())


def _check_writable(path: Path) -> None:
    """Raise sqlite3.Error where SQLite cannot write or lock that file: MLflow 3.17 tries such a
    one for 100 seconds."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
