import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cldf_dist.__main__ import main
from cldf_dist.config import Config, Data, Tracking
from cldf_dist.runs import sync_tracking, tracking
from cldf_dist.runs import tracking_store as store
from cldf_dist.runs.run import Run, read_config
from cldf_dist.system.locks import FolderLock

Start = Callable[..., "subprocess.Popen[str]"]
STAGE, NAME = "train-cam", "trial"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: making its tables takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("tables")
    store.connect(store.sqlite_uri(folder / store.FILE), folder)
    return folder / store.FILE


@pytest.fixture
def config(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A folder of runs with an empty store, and one more as the target."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for folder in ("runs", "target"):
        (tmp_path / folder).mkdir()
        shutil.copy(tables, tmp_path / folder)
    return Config(name=NAME, runs=str(tmp_path / "runs"), data=Data(dataset="phantom"))


@pytest.fixture
def target(tmp_path: Path) -> str:
    return store.sqlite_uri(tmp_path / "target" / store.FILE)


def logged(config: Config, steps: range, stage: str = STAGE) -> Run:
    run = Run(config, stage, ())
    run.open()
    for step in steps:
        run.log(step, {"loss": float(step), "rate": 0.5})
    return run


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_in(uri: str) -> list[Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name("cldf")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def wait_for(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def named(uri: str, name: str) -> Any:
    """The one run of that name."""
    (run,) = [run for run in runs_in(uri) if run.info.run_name == name]
    return run


def history(uri: str, name: str, metric: str = "loss") -> list[tuple[int, float]]:
    entries = client_of(uri).get_metric_history(named(uri, name).info.run_id, metric)
    return sorted((entry.step, entry.value) for entry in entries)


def values(uri: str, name: str) -> list[tuple[int, float, int]]:
    client = client_of(uri)
    entries = client.get_metric_history(named(uri, name).info.run_id, "loss")
    return [(entry.step, entry.value, entry.timestamp) for entry in entries]


def synced(config: Config, target: str) -> sync_tracking.Counts:
    return sync_tracking.sync(Path(config.runs), target)


def test_a_sync_sends_everything_and_a_second_one_nothing(config: Config, target: str) -> None:
    logged(config, range(1, 4)).finish()
    logged(config, range(2), "cache/parts/1-of-2").close()
    first = synced(config, target)
    assert (first.runs, first.runs_there) == (3, 0)
    assert (first.values, first.values_there) == (10, 0)
    assert first.parameters > 400
    assert first.damaged == []
    again = synced(config, target)
    assert (again.runs, again.parameters, again.values) == (0, 0, 0)
    assert (again.runs_there, again.values_there) == (3, 10)
    local = store.sqlite_uri(Path(config.runs) / store.FILE)
    assert len(runs_in(target)) == 3
    for name in (STAGE, "cache/parts/1-of-2"):
        here, there = named(local, name), named(target, name)
        assert there.data.params == here.data.params
        assert values(target, name) == values(local, name)
        for fact in ("status", "start_time", "end_time"):
            assert getattr(there.info, fact) == getattr(here.info, fact), fact
        assert there.data.tags["stage"] == name
        assert there.data.tags["mlflow.parentRunId"] == named(target, NAME).info.run_id


def test_a_sync_while_a_stage_writes_is_completed_by_the_next_one(
    config: Config, target: str
) -> None:
    run = logged(config, range(1, 3))  # still in metrics.jsonl alone
    assert synced(config, target).values == 4
    assert named(target, STAGE).info.status == "RUNNING"
    for step in (3, 4):
        run.log(step, {"loss": float(step), "rate": 0.5})
    run.finish()
    assert synced(config, target).values == 4
    assert history(target, STAGE) == [(step, float(step)) for step in range(1, 5)]
    assert named(target, STAGE).info.status == "FINISHED"


def test_a_sync_that_is_killed_anywhere_is_completed_by_the_same_command(
    config: Config, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracking, "BATCH", 2)
    logged(config, range(1, 4)).finish()
    calls = 0

    def killed_after_some(action: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*words: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            done = action(*words, **more)
            if calls % 3 == 0:
                raise KeyboardInterrupt
            return done

        return stopping

    for name in ("create_run", "log_batch", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, killed_after_some(getattr(MlflowClient, name)))
    num_kills = 0
    while True:
        try:
            synced(config, target)
            break
        except KeyboardInterrupt:
            num_kills += 1
            assert num_kills < 20
    assert num_kills > 1
    assert len(runs_in(target)) == 2
    assert history(target, STAGE) == [(step, float(step)) for step in range(1, 4)]
    assert named(target, STAGE).info.status == "FINISHED"


def test_a_requeued_stage_is_one_run_and_metrics_jsonl_decides(
    config: Config, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(config, range(1, 5)).close()
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # from now on no store is written
    run = Run(config, STAGE, ())
    run.open()
    run.start_logging_from(2)
    for step in (3, 4, 5):
        run.log(step, {"loss": -float(step)})
    run.finish()
    for _ in range(2):
        synced(config, target)
        expected = [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0), (5, -5.0)]
        assert history(target, STAGE) == expected
        assert len(runs_in(target)) == 2
        stage = named(target, STAGE)
        assert (stage.info.status, stage.data.tags["slurm.jobs"]) == ("FINISHED", "17")
    # without a server the local file gets what it lacks, to look at
    local = store.sqlite_uri(Path(config.runs) / store.FILE)
    assert main(["sync-tracking", f"runs={config.runs}"]) == 0
    assert [step for step, _ in history(local, STAGE)] == [1, 2, 3, 4, 5]


def test_stages_that_were_never_tracked_are_sent_with_their_state(
    config: Config, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    finished = ("prepare", "train-decoder", "train-decoder/cldf_plus", "cache/parts/1-of-2")
    for stage in finished:
        logged(config, range(2), stage).finish()
    logged(config, range(2)).close()
    synced(config, target)
    found = {run.info.run_name: run.info.status for run in runs_in(target)}
    assert found == {**dict.fromkeys(finished, "FINISHED"), STAGE: "KILLED", NAME: "KILLED"}
    logged(config, range(2, 4)).finish()
    synced(config, target)
    assert {run.info.status for run in runs_in(target)} == {"FINISHED"}
    assert [step for step, _ in history(target, STAGE)] == [0, 1, 2, 3]


def test_a_stage_that_two_runs_share_is_sent_once_and_belongs_to_the_one_that_made_it(
    config: Config, target: str
) -> None:
    """As the runs of a study share theirs; a name may be of several folders."""
    made = replace(config, name="phantom/base/seed1")
    logged(made, range(3), "prepare").finish()
    taker = Path(config.runs) / "phantom/base/seed0"
    shutil.copytree(made.run_folder / "prepare", taker / "prepare")
    for _ in range(2):
        synced(config, target)
        prepare, parent = named(target, "prepare"), named(target, made.name)
        assert len(runs_in(target)) == 2
        assert prepare.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert [step for step, _ in history(target, "prepare")] == [0, 1, 2]
    assert read_config(taker / "prepare" / "config.yaml").name == made.name


def test_a_run_that_was_deleted_there_stays_deleted(config: Config, target: str) -> None:
    logged(config, range(1, 3)).finish()
    synced(config, target)
    client_of(target).delete_run(named(target, STAGE).info.run_id)
    again = synced(config, target)
    assert (again.runs, again.runs_there, again.runs_deleted) == (0, 1, 1)
    assert "1 deleted there and left out" in str(again)
    assert [run.info.run_name for run in runs_in(target)] == [NAME]


def test_a_point_that_a_stage_and_a_sync_send_at_once_is_kept_once(
    config: Config, target: str
) -> None:
    run = logged(config, range(1, 4))
    run.log(9, {"rate": float("nan")})
    client = client_of(target)
    senders = [
        tracking.StageSender(client, Path(config.runs), run.folder, config) for _ in range(2)
    ]
    for sender in senders:
        sender._known = {}  # what the other one sends comes in this very moment
        sender.send_values()
    assert history(target, STAGE) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [step for step, _ in history(target, STAGE, "rate")] == [1, 2, 3, 9]
    run.close()


def test_two_syncs_at_once_are_refused(
    config: Config, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(config, range(1, 3)).finish()
    folder = Path(config.runs) / ".sync-tracking"
    folder.mkdir()
    lock = FolderLock(folder)
    words = ["sync-tracking", f"runs={config.runs}", f"to={target}"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"cldf: error: {folder} is in use by process {os.getpid()} on ")
    lock.release()
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to=127.0.0.1:5000"], "to must be http://HOST:PORT or sqlite:///FILE, got '127.0.0.1"),
        (["to="], "to must be http://HOST:PORT or sqlite:///FILE, got ''"),
        (["to=http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9 is out of reach or refuses ("),
        (["runs=/nowhere", "to=http://127.0.0.1:9"], "no stage of a run below /nowhere; name its"),
        (["tracking.url=x"], "unknown config key tracking.url; did you mean tracking.uri?"),
        (["--dry-run"], "--dry-run is for stages"),
    ],
)
def test_what_cannot_be_synced_is_one_line(
    words: list[str], said: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(replace(config, tracking=Tracking(enabled=False)), range(2)).finish()
    assert main(["sync-tracking", f"runs={config.runs}", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cldf: error: {said}")


@contextmanager
def server(start: Start, database: Path) -> Iterator[str]:
    """A real MLflow server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"--backend-store-uri={store.sqlite_uri(database)}", "--host=127.0.0.1"]
    words += [f"--port={port}", "--workers=1", f"--default-artifact-root={database.parent}"]
    less = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = start("-m", "mlflow", "server", *words, start_new_session=True, **less)
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.1)
    try:
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


TWICE = """
import sys
from cldf_dist.__main__ import main
assert [main(["sync-tracking", *sys.argv[1:]]) for _ in range(2)] == [0, 0]
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_a_real_server_that_comes_and_goes_has_one_run_with_all_steps_in_the_end(
    config: Config, target: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Path(config.runs)
    with server(start, Path(target.removeprefix("sqlite:///"))) as uri:
        tracked = replace(config, tracking=Tracking(uri=uri))
        logged(tracked, range(1, 3)).close()
        assert capsys.readouterr().err == ""
        away = replace(config, tracking=Tracking(uri="http://127.0.0.1:9"))
        logged(away, range(3, 5)).close()  # its metrics.jsonl alone has them
        process = start("-c", TWICE, f"to={uri}/", f"runs={runs}")
        said, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert "metric values  4 sent, 4 there already" in said
        assert "metric values  0 sent, 8 there already" in said
        capsys.readouterr()
        run = logged(tracked, range(0))
        wait_for(lambda: named(uri, STAGE).data.tags["cldf.starts"] == "3")
        assert capsys.readouterr().err == ""
    for step in (5, 6):
        run.log(step, {"loss": float(step), "rate": 0.5})
    run.finish()  # now the server is away
    assert f"cldf sync-tracking to={uri} runs={runs} sends what" in capsys.readouterr().err
    assert [step for step, _ in history(target, STAGE)] == [1, 2, 3, 4]
    assert synced(config, target).values == 4
    assert history(target, STAGE) == [(step, float(step)) for step in range(1, 7)]
    assert len(runs_in(target)) == 2
    assert named(target, STAGE).info.status == "FINISHED"
    assert named(target, STAGE).data.tags["cldf.starts"] == "3"


def test_a_damaged_stage_is_named_and_the_others_are_sent(
    config: Config, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(config, range(3)).close()
    run = logged(config, range(3), "prepare")
    run.close()
    damaged = run.folder
    (damaged / "run.json").write_text("{")
    capsys.readouterr()
    assert main(["sync-tracking", f"runs={config.runs}", f"to={target}"]) == 1
    said = capsys.readouterr()
    assert "metric values  6 sent" in said.out
    assert said.err.startswith(f"cldf: error: {damaged} is left out: {damaged / 'run.json'} is da")
