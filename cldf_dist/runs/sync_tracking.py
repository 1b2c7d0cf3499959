"""`cldf sync-tracking`: replay the local MLflow stores of a folder of runs to a server.

Each source run is one run there, found again by its tag `cldf.run`; only what is missing is sent.
So it can be killed and repeated, and it can go on while trainings write: the next time adds the
rest. Points that no store has yet come from the stage's metrics.jsonl. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cldf_dist.config import Config, load
from cldf_dist.runs import tracking_store as store
from cldf_dist.system.locks import FolderLock

SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql")
# below the folder of runs: a stage's folder, one inside it, and the parts of the cache
PLACES = ("*/*", "*/*/*", "*/cache/parts/*")
OURS = ("cldf.", "slurm.", "stage")  # tags that follow the source; others are the reader's own
COPIED = ("mlflow.note.content", "mlflow.source.", "mlflow.user")  # of MLflow's own tags
PAGE = 1000


@dataclass
class Source:
    """One run, in all the local stores that hold it: where a stage was tracked may change."""

    identity: str
    experiment: str
    parent: str = ""  # the identity of the run that holds this one
    copies: list[tuple[Any, Any]] = field(default_factory=list)  # client and run, the newest first

    @property
    def newest(self) -> Any:
        return self.copies[0][1]


@dataclass
class Counts:
    """What a replay sent, and what was there already."""

    runs: int = 0
    runs_there: int = 0
    runs_deleted: int = 0
    parameters: int = 0
    parameters_there: int = 0
    values: int = 0
    values_there: int = 0
    damaged: list[str] = field(default_factory=list)  # what is wrong with which local store

    def __str__(self) -> str:
        lines = [
            f"runs           {self.runs} sent, {self.runs_there} there already",
            f"parameters     {self.parameters} sent, {self.parameters_there} there already",
            f"metric values  {self.values} sent, {self.values_there} there already",
        ]
        if self.runs_deleted:
            lines[0] += f", {self.runs_deleted} deleted there and left out"
        return "\n".join(lines)


def run(words: Sequence[str]) -> int:
    """What the command line does; the exit code. ValueError and OSError say what is wrong."""
    config, target = _asked(words)
    print(f"{config.runs} to {target}")
    counts = replay(Path(config.runs), target)
    print(counts)
    for sentence in counts.damaged:
        print(f"cldf: error: {sentence}", file=sys.stderr)
    return 1 if counts.damaged else 0


def replay(runs: Path, target: str) -> Counts:
    """Send what the local stores below `runs` hold and the store at `target` lacks."""
    uris = [uri for uri in _local_stores(runs) if uri != target]
    if not uris:
        raise FileNotFoundError(
            f"no tracking store below {runs} to replay (mlflow.db, or STAGE/mlflow.db of a run); "
            "name the folder with runs=FOLDER"
        )
    store.prepare_mlflow(target)
    store.prepare_mlflow(uris[0])
    with _only_one(runs):
        with _told(target):
            client = store.client_of(target, lambda: store.alone(runs))
        counts, targets = Counts(), dict[str, str]()
        for source in _sources(uris, counts.damaged):
            with _told(target):
                _replay_run(source, client, runs, targets, counts)
    return counts


def _asked(words: Sequence[str]) -> tuple[Config, str]:
    settings = [word for word in words if "=" in word and not word.startswith("to=")]
    files = [word for word in words if "=" not in word]
    if not files:
        settings.insert(0, "data.dataset=phantom")  # no data is read
    config = load(files, settings)
    to = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    target = to[-1] if to else config.tracking.uri
    if not to and not target:
        target = store.sqlite_uri(Path(config.runs) / store.FILE)
    if not target.startswith(SCHEMES):
        raise ValueError(f"to must be http://HOST:PORT or sqlite:///FILE, got {target!r}")
    path = store.sqlite_path(target)
    return config, store.sqlite_uri(path) if path else target.rstrip("/")


def _local_stores(runs: Path) -> list[str]:
    folders = [runs, *sorted(folder for place in PLACES for folder in runs.glob(place))]
    paths = dict.fromkeys(folder / store.FILE for folder in folders)
    return [store.sqlite_uri(path) for path in paths if path.is_file()]


@contextmanager
def _only_one(runs: Path) -> Iterator[None]:
    """While no other replay of this folder is at work."""
    folder = runs / ".sync-tracking"
    folder.mkdir(exist_ok=True)
    try:
        lock = FolderLock(folder)
    except RuntimeError as error:
        owner = str(error).partition(" is in use by ")[2].partition(";")[0]
        raise RuntimeError(
            f"another cldf sync-tracking is at work on {runs} ({owner}); wait for it"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """What MLflow raises (it has no common kind) becomes an OSError with the address."""
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


def _sources(uris: Sequence[str], damaged: list[str]) -> list[Source]:
    """The runs of all local stores, those that hold others first; a store that cannot be read is
    left out, and told in `damaged`."""
    found: dict[str, Source] = {}
    identities: dict[str, str] = {}
    for uri in uris:
        try:
            client = store.client_of(uri)
            runs = list(_runs_in(client))
        except Exception as error:  # MLflow's and SQLite's have no common kind
            reason = " ".join(str(error).split())[:200]
            damaged.append(
                f"{store.sqlite_path(uri)} cannot be read or locked ({reason}) and is left out; if "
                "it is damaged, move it away: its stage's metrics.jsonl holds the values"
            )
            continue
        for experiment, run in runs:
            identity = run.data.tags.get(store.IDENTITY, run.info.run_id)
            identities[run.info.run_id] = identity
            source = found.setdefault(identity, Source(identity, experiment))
            source.copies.append((client, run))
    for source in found.values():
        source.copies.sort(key=lambda copy: _opened(copy[1]), reverse=True)
        source.parent = identities.get(source.newest.data.tags.get(store.PARENT, ""), "")
    return sorted(found.values(), key=lambda source: bool(source.parent))


def _runs_in(client: Any) -> Iterator[tuple[str, Any]]:
    """Every run of a store that is not deleted, with the name of its experiment."""
    for experiment in client.search_experiments():
        token = None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], max_results=PAGE, page_token=token
            )
            yield from ((experiment.name, run) for run in page)
            token = page.token
            if not token:
                break


def _replay_run(
    source: Source, client: Any, runs: Path, targets: dict[str, str], counts: Counts
) -> None:
    """Send what the target lacks of one run; `targets` gets its id there."""
    experiment = store.experiment_in(client, source.experiment)
    tags = _tags(source, targets)
    with store.alone(runs):
        there = store.run_of(client, experiment, source.identity, deleted=True)
        run = there or client.create_run(
            experiment,
            start_time=min(copy.info.start_time for _, copy in source.copies),
            run_name=source.newest.info.run_name,
            tags=tags,
        )
    if run.info.lifecycle_stage == "deleted":
        counts.runs_deleted += 1
        return
    run_id = targets[source.identity] = run.info.run_id
    counts.runs += there is None
    counts.runs_there += there is not None
    _send_parameters(source, client, run, counts)
    folder = _folder_of(source, runs)
    points = _points(source, folder)
    sent = store.send_points(client, run_id, points, store.known_steps(client, run_id))
    counts.values += sent
    counts.values_there += len({(point.name, point.step) for point in points}) - sent
    if there is None or _opened(source.newest) >= _opened(there):
        _send_state(source, client, run, tags, folder)


def _send_parameters(source: Source, client: Any, run: Any, counts: Counts) -> None:
    parameters: dict[str, str] = {}
    for _, copy in reversed(source.copies):
        parameters.update(copy.data.params)
    sent = store.send_parameters(client, run, parameters)
    counts.parameters += sent
    counts.parameters_there += len(parameters) - sent


def _send_state(
    source: Source, client: Any, run: Any, tags: dict[str, str], folder: Path | None
) -> None:
    """Tags and status; those of a run that was opened there since are left as they are."""
    known = run.data.tags
    ours = {key: value for key, value in tags.items() if key.startswith(OURS) or key not in known}
    store.set_tags(client, run, ours)
    status, ended = source.newest.info.status, source.newest.info.end_time
    if folder is not None and (folder / "DONE").is_file() and status != "FINISHED":
        # killed between that word and MLflow's
        status, ended = "FINISHED", round(1000 * (folder / "DONE").stat().st_mtime)
    if status == run.info.status and ended == run.info.end_time:
        return
    if status in ("RUNNING", "SCHEDULED"):
        client.update_run(run.info.run_id, status=status)
    else:
        client.set_terminated(run.info.run_id, status, ended)


def _points(source: Source, folder: Path | None) -> list[store.Point]:
    """What metrics.jsonl holds, which is the truth, and then what only the stores know."""
    points, _ = store.read_points(folder / "metrics.jsonl") if folder else ([], 0)
    for client, run in source.copies:
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            points += [store.Point(name, one.step, one.value, one.timestamp) for one in history]
    return points


def _tags(source: Source, targets: dict[str, str]) -> dict[str, str]:
    tags = {
        key: value
        for key, value in source.newest.data.tags.items()
        if not key.startswith("mlflow.") or key.startswith(COPIED)
    }
    tags[store.IDENTITY] = source.identity
    if source.parent in targets:
        tags[store.PARENT] = targets[source.parent]
    return tags


def _folder_of(source: Source, runs: Path) -> Path | None:
    """The stage's folder, if it still is the one that this run was made from."""
    place = source.newest.data.tags.get(store.FOLDER)
    about = runs / place / "run.json" if place else None
    if about is None or not about.is_file():
        return None
    return about.parent if json.loads(about.read_text()).get("id") == source.identity else None


def _opened(run: Any) -> int:
    """When a run was last started, in milliseconds."""
    return int(run.data.tags.get(store.OPENED, run.info.start_time))
