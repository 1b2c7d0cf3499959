import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cldf_dist.config import Config, Data, Tracking
from cldf_dist.runs import tracking
from cldf_dist.runs.run import Run
from cldf_dist.runs.tracking_store import FILE, connect, sqlite_uri

# MLflow 3.17 uses what SQLAlchemy 2.1 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

PROGRAM = str(Path(__file__).parents[1] / "tracked_stages.py")
CONFIG = Config(name="trial", data=Data(dataset="phantom"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: making its tables takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("tables")
    connect(sqlite_uri(folder / FILE), folder)
    return folder / FILE


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tables: Path) -> Path:
    """One folder of runs, and so one database."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(tables, folder)
    return folder


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def config(runs: Path, request: pytest.FixtureRequest) -> Config:
    return replace(CONFIG, name=request.node.name, runs=str(runs))


def client_of(config: Config) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{config.runs}/mlflow.db")


def runs_of(config: Config) -> dict[str, Any]:
    """The experiment's MLflow runs that belong to this run's folder, by name."""
    client = client_of(config)
    experiment = client.get_experiment_by_name("cldf")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if run.info.run_name == config.name]
    assert len(parents) == 1
    parent = parents[0].info.run_id
    nested = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len({run.info.run_name for run in nested}) == len(nested)
    return {"parent": parents[0], **{run.info.run_name: run for run in nested}}


def steps_of(client: Any, run: Any, name: str) -> list[int]:
    return [entry.step for entry in client.get_metric_history(run.info.run_id, name)]


def wait_for(claim: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(StopIteration, KeyError, AttributeError, AssertionError):
            if claim():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def opened(config: Config, stage: str = "train-cam") -> Run:
    run = Run(config, stage, ("cam",))
    run.open()
    return run


@pytest.mark.slow  # imports MLflow and makes the database
def test_a_stage_is_a_nested_run_with_metrics_and_settings(config: Config) -> None:
    run = opened(config)
    for step in (2, 4):
        run.log(step, {"train/loss": 1 / step, "train/skipped_steps": 0.0})
    run.finish()
    opened(config, "cache").finish()
    found = runs_of(config)
    assert set(found) == {"parent", "train-cam", "cache"}
    stage = found["train-cam"]
    assert stage.info.status == "FINISHED"
    assert stage.data.params["cam.layer"] == "layer2"
    assert stage.data.params["decoder.contrast.temperature"] == "0.1"
    history = client_of(config).get_metric_history(stage.info.run_id, "train/loss")
    assert [(entry.step, entry.value) for entry in history] == [(2, 0.5), (4, 0.25)]


def test_a_stage_that_is_started_again_goes_on_in_the_same_run_without_doubles(
    config: Config,
) -> None:
    run = opened(config)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    run.close()
    first = runs_of(config)["train-cam"].info
    assert first.status == "KILLED"
    again = opened(config)
    again.start_logging_from(1)  # the checkpoint is older than what was logged
    for step in (2, 3, 4):
        again.log(step, {"loss": float(step), "late": 0.5})
    again.finish()
    stage = runs_of(config)["train-cam"]
    assert (stage.info.run_id, stage.info.status) == (first.run_id, "FINISHED")
    client = client_of(config)
    assert [entry.step for entry in client.get_metric_history(first.run_id, "loss")] == [1, 2, 3, 4]
    late = client.get_metric_history(first.run_id, "late")
    assert [entry.step for entry in late] == [2, 3, 4]


def test_steps_that_were_logged_and_not_sent_when_a_stage_was_killed_are_sent_by_the_next_start(
    config: Config,
) -> None:
    run = opened(config)
    for step in (1, 2):
        run.log(step, {"loss": float(step)})
    run.close()
    # a start that is killed leaves lines in metrics.jsonl which nobody has sent
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step in (3, 4, 5):
            file.write(json.dumps({"step": step, "time": 1e9, "loss": float(step)}) + "\n")
        file.write('{"step": 6, "ti')
    again = opened(config)
    again.start_logging_from(4)
    for step in (5, 6):
        again.log(step, {"loss": -float(step)})
    again.finish()
    stage = runs_of(config)["train-cam"]
    history = client_of(config).get_metric_history(stage.info.run_id, "loss")
    sent = {entry.step: entry.value for entry in history}
    assert sent == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: -5.0, 6: -6.0}
    assert len(history) == 6
    assert stage.data.tags["cldf.starts"] == "2"


def test_a_run_that_was_deleted_is_made_anew_and_whole(config: Config) -> None:
    run = opened(config)
    run.log(1, {"loss": 1.0})
    run.close()
    client_of(config).delete_run(runs_of(config)["train-cam"].info.run_id)
    again = opened(config)
    again.log(2, {"loss": 2.0})
    again.finish()
    stage = runs_of(config)["train-cam"]
    assert steps_of(client_of(config), stage, "loss") == [1, 2]


def test_parts_of_the_cache_are_nested_in_the_one_run_of_the_experiment(config: Config) -> None:
    parts = [f"cache/parts/{number}-of-2" for number in (1, 2)]
    for run in [opened(config, part) for part in parts]:  # both are open at once
        run.finish()
    assert set(runs_of(config)) == {"parent", *parts}


def test_many_metrics_go_in_several_requests(config: Config) -> None:
    run = opened(config)
    for step in range(120):
        run.log(step, {f"metric_{number}": float(step) for number in range(10)})
    run.finish()
    stage = runs_of(config)["train-cam"]
    assert len(stage.data.metrics) == 10
    history = client_of(config).get_metric_history(stage.info.run_id, "metric_9")
    assert [entry.step for entry in history] == list(range(120))


def test_without_the_server_a_stage_finishes_and_says_how_to_send_it_later(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "http://127.0.0.1:9"
    run = opened(replace(config, tracking=Tracking(uri=uri)))
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run.finish()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: MLflow is out of reach (")
    assert "metrics.jsonl holds everything" in said
    assert f"cldf sync-tracking to={uri} runs={config.runs} sends what is missing later" in said
    assert said.endswith("tracking.enabled=false silences this")
    assert run.is_finished
    assert not list(run.folder.glob("*.db"))


def test_a_server_that_comes_back_gets_what_it_missed_from_the_next_start(config: Config) -> None:
    run = opened(replace(config, tracking=Tracking(uri="http://127.0.0.1:9")))
    run.log(1, {"loss": 1.0})
    run.close()
    again = opened(config)
    again.log(2, {"loss": 2.0})
    again.finish()
    stage = runs_of(config)["train-cam"]
    assert steps_of(client_of(config), stage, "loss") == [1, 2]


def test_a_server_without_an_answer_holds_the_end_of_a_stage_up_for_a_bounded_time(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_CLOSE", 0.2)
    with socket.socket() as silent:  # accepts connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = opened(replace(config, tracking=Tracking(uri=uri)))
        run.log(1, {"loss": 1.0})
        run.finish()
        (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: MLflow is out of reach (no end after 0 s)")
    assert run.is_finished


def test_a_store_that_refuses_during_training_warns_once_and_is_tried_again(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_SENDS", 0.05)
    run = opened(config)
    run.log(1, {"loss": 1.0})
    wait_for(lambda: runs_of(config)["train-cam"].data.metrics)
    client_of(config).delete_run(runs_of(config)["train-cam"].info.run_id)  # refuses metrics now
    for step in range(2, 1200):
        run.log(step, {"loss": 1.0})
    run.finish()
    assert capsys.readouterr().err.count("warning: MLflow is out of reach") == 1
    stage = runs_of(config)["train-cam"]
    assert steps_of(client_of(config), stage, "loss") == list(range(1, 1200))


def test_values_are_sent_while_a_stage_works(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_SENDS", 0.05)
    run = opened(config)
    for step in (1, 2):
        run.log(step, {"loss": float(step)})
        wait_for(lambda loss=step: runs_of(config)["train-cam"].data.metrics["loss"] == loss)
    assert runs_of(config)["train-cam"].info.status == "RUNNING"
    assert runs_of(config)["parent"].info.status == "RUNNING"
    run.start_logging_from(1)  # a new file, of which step 2 was sent
    run.log(2, {"loss": -2.0})
    run.log(3, {"loss": -3.0})
    run.finish()
    stage = runs_of(config)["train-cam"]
    history = client_of(config).get_metric_history(stage.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, -3.0)]


def test_lines_that_will_be_computed_again_are_not_sent_before(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_SENDS", 0.05)
    run = opened(config)
    run.log(1, {"loss": 1.0})
    run.close()
    with (run.folder / "metrics.jsonl").open("a") as file:  # of a start that was killed
        file.write(json.dumps({"step": 2, "time": 1e9, "loss": 2.0}) + "\n")
    again = opened(config)
    wait_for(lambda: runs_of(config)["train-cam"].data.tags["cldf.starts"] == "2")
    again.close()  # before the training has read its checkpoint
    stage = runs_of(config)["train-cam"]
    assert steps_of(client_of(config), stage, "loss") == [1]


def test_a_damaged_store_warns_and_training_goes_on(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(os.urandom(5000))
    run = opened(replace(config, runs=str(tmp_path)), "cache")
    run.log(1, {"loss": 1.0})
    run.finish()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: MLflow is out of reach (")
    assert run.is_finished


def test_a_slurm_job_without_a_server_writes_no_sqlite_and_says_how_to_send_it_later(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("17", "17", "23"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        run = opened(config)
        run.log(1, {"loss": 1.0})
        run.close()
        (said,) = capsys.readouterr().err.splitlines()
        assert "(a SLURM job needs tracking.uri=http://HOST:PORT)" in said
        assert f"cldf sync-tracking runs={config.runs} sends" in said
    assert not list(config.run_folder.rglob("*.db"))
    monkeypatch.delenv("SLURM_JOB_ID")
    opened(config).finish()
    tags = runs_of(config)["train-cam"].data.tags
    assert (tags["slurm.jobs"], tags["cldf.starts"]) == ("17,23", "4")


@pytest.mark.slow
def test_eight_stages_that_start_in_the_same_instant_make_one_parent_and_lose_nothing(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    parts = [f"cache/parts/{number}-of-5" for number in range(1, 6)]
    stages = ["train-diffusion", "train-classifier", "train-cam", *parts]
    process = start(PROGRAM, "together", str(tmp_path), "train-cam", *stages)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors == ""
    config = replace(CONFIG, name="together", runs=str(tmp_path))
    opened(config, "train-cam").finish()  # the one that was killed before it sent anything
    found = runs_of(config)
    assert set(found) == {"parent", *stages}
    for stage in stages:
        assert steps_of(client_of(config), found[stage], "loss") == [1, 2, 3], stage
        assert found[stage].info.status == "FINISHED"


@pytest.mark.slow
def test_a_stage_that_is_killed_while_it_sends_has_every_step_once_in_the_end(
    tmp_path: Path, tables: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    shutil.copy(tables, tmp_path)
    kills = ["22", "33", "41", "48", "57"]
    process = start(PROGRAM, "again", str(tmp_path), "train-cam", *kills)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    config = replace(CONFIG, name="together", runs=str(tmp_path))
    stage = runs_of(config)["train-cam"]
    assert (stage.info.status, stage.data.tags["cldf.starts"]) == ("FINISHED", "6")
    for name in ("loss", "rate"):
        assert steps_of(client_of(config), stage, name) == list(range(1, 61))


@pytest.mark.slow
def test_two_ranks_that_are_killed_and_started_again_are_one_run_with_every_step_once(
    tmp_path: Path, tables: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    shutil.copy(tables, tmp_path)
    starts = [
        {"ranks": 2, "zero": 0, "scenarios": [f"requeued log_every=1 tracked=1 {more}"]}
        for more in ("kill=5 victim=0", "")
    ]
    forked = str(Path(__file__).parents[1] / "trainings" / "forked.py")
    process = start(forked, str(tmp_path), json.dumps(starts))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    killed, resumed = (json.loads(line) for line in said.splitlines())
    assert killed["codes"][0] == -signal.SIGKILL, killed
    assert resumed["codes"] == [0, 0], resumed
    config = replace(CONFIG, name="requeued", runs=str(tmp_path))
    found = runs_of(config)
    assert set(found) == {"parent", "train-test"}
    assert steps_of(client_of(config), found["train-test"], "train/loss") == list(range(1, 10))


def test_without_tracking_mlflow_is_not_imported(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    code = f"""
import sys
from cldf_dist.config import Config, Tracking
from cldf_dist.runs.run import Run
config = Config(name="trial", runs={str(tmp_path)!r}, tracking=Tracking(enabled=False))
run = Run(config, "cache", ())
run.open()
run.log(1, {{"loss": 1.0}})
run.finish()
assert run.is_finished
assert not any(name.split(".")[0] == "mlflow" for name in sys.modules)
"""
    process = start("-c", code)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not list(tmp_path.rglob("mlflow.db"))
