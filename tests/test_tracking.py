import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cldf_dist.config import Config, Data, Tracking
from cldf_dist.run import Run
from cldf_dist.tracking import Tracker

# MLflow 3.17 uses what SQLAlchemy 2.1 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CONFIG = Config(name="trial", data=Data(dataset="phantom"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, and so one database: making its tables takes seconds."""
    return tmp_path_factory.mktemp("runs")


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


def test_a_run_that_the_server_forgot_is_made_anew(config: Config) -> None:
    run = opened(config)
    run.close()
    (run.folder / "tracking.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    again = opened(config)
    again.log(1, {"loss": 1.0})
    again.finish()
    # the first one is still there, so there are two nested runs of that name
    client = client_of(config)
    experiment = client.get_experiment_by_name("cldf").experiment_id
    parent = [r for r in client.search_runs([experiment]) if r.info.run_name == config.name]
    mine = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{parent[0].info.run_id}'"
    )
    assert sorted(len(run.data.metrics) for run in mine) == [0, 1]


def test_many_metrics_go_in_several_requests(config: Config) -> None:
    run = opened(config)
    for step in range(120):
        run.log(step, {f"metric_{number}": float(step) for number in range(10)})
    run.finish()
    stage = runs_of(config)["train-cam"]
    assert len(stage.data.metrics) == 10
    history = client_of(config).get_metric_history(stage.info.run_id, "metric_9")
    assert [entry.step for entry in history] == list(range(120))


def test_an_unreachable_server_warns_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Tracking(uri="http://127.0.0.1:9")
    run = opened(replace(CONFIG, runs=str(tmp_path), tracking=away))
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run.finish()
    assert capsys.readouterr().err.count("warning: MLflow is out of reach") == 1
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert run.is_finished


def test_a_server_that_goes_away_during_training_warns_once(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(config)
    run.log(1, {"loss": 1.0})
    run.close()
    tracker = Tracker(config, run.folder, run.stage)
    client_of(config).delete_run(runs_of(config)["train-cam"].info.run_id)  # refuses metrics now
    for step in range(2, 2000):
        tracker.log(step, {"loss": 1.0})
    tracker.close("FINISHED")
    assert capsys.readouterr().err.count("warning: MLflow is out of reach") == 1


def test_without_tracking_mlflow_is_not_imported(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    code = f"""
import sys
from cldf_dist.config import Config, Tracking
from cldf_dist.run import Run
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
