import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cldf_dist.config import Cam, Config, Data, Fit, Tracking
from cldf_dist.runs.run import (
    Run,
    changed_keys,
    command_for,
    read_config,
    seconds_of,
    write_atomically,
)

CONFIG = Config(name="trial", data=Data(dataset="phantom"), tracking=Tracking(enabled=False))

HOLDER = """
import sys, time
from cldf_dist.config import Config, Tracking
from cldf_dist.runs.run import Run
config = Config(name="trial", runs=sys.argv[1], tracking=Tracking(enabled=False))
run = Run(config, "train-cam", ("cam",))
run.open()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(CONFIG, runs=str(tmp_path))


def make(config: Config, stage: str = "train-cam") -> Run:
    return Run(config, stage, ("cam", "seed"), ("prepare",) if stage == "train-cam" else ())


def opened(config: Config, stage: str = "train-cam") -> Run:
    run = make(config, stage)
    run.open()
    return run


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_is_finished_when_it_says_so_and_not_before(config: Config) -> None:
    run = opened(config)
    assert run.folder == Path(config.runs) / "trial" / "train-cam"
    assert not run.is_finished
    run.finish({"parameters": 12})
    assert make(config).is_finished
    word = json.loads((run.folder / "DONE").read_text())
    assert (word["stage"], word["parameters"]) == ("train-cam", 12)
    assert make(config, "cache").needs("train-cam") == run.folder


def test_a_missing_input_names_the_command_that_makes_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["cldf", "train-cam", "a.yaml", "b.yaml", "--dry-run", "seed=3"]
    )
    assert command_for("prepare") == "cldf prepare a.yaml b.yaml seed=3"
    with pytest.raises(
        FileNotFoundError, match=r"trial/prepare is not finished; run: cldf prepare a\.yaml"
    ):
        make(config).needs("prepare")
    opened(config, "prepare").close()
    with pytest.raises(FileNotFoundError, match="is not finished"):
        make(config).needs("prepare")


def test_a_folder_in_use_names_the_process_and_is_free_after_it_was_killed(
    config: Config, start: Callable[..., Any]
) -> None:
    holder = start("-c", HOLDER, config.runs)
    assert holder.stdout.readline() == "held\n", holder.communicate()
    with pytest.raises(
        RuntimeError, match=f"trial/train-cam is in use by process {holder.pid} on "
    ):
        opened(config)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    opened(config).close()


def test_two_runs_in_one_process_exclude_each_other_until_one_lets_go(config: Config) -> None:
    first = opened(config)
    with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} "):
        opened(config)
    opened(config, "cache").close()
    first.close()
    opened(config).close()


def begun(config: Config) -> None:
    """A stage that has worked a little."""
    run = opened(config)
    run.log(1, {"loss": 1.0})
    run.close()


def test_a_setting_may_change_as_long_as_nothing_was_computed(config: Config) -> None:
    opened(config).close()
    changed = replace(config, cam=replace(config.cam, dropout=0.25))
    run = opened(changed)
    assert read_config(run.folder / "config.yaml") == changed
    run.log(1, {"loss": 1.0})
    run.close()
    with pytest.raises(ValueError, match=r"was made with cam\.dropout=0\.25, not 0\.1"):
        opened(config)


def test_a_changed_setting_is_refused_with_key_old_and_new_value(config: Config) -> None:
    begun(config)
    changed = replace(config, cam=replace(config.cam, dropout=0.25))
    refused = make(changed)
    with pytest.raises(
        ValueError, match=r"was made with cam\.dropout=0\.1, not 0\.25; take another name"
    ):
        refused.open()
    assert read_config(refused.folder / "config.yaml") == config, "what was made stays described"
    opened(config).close()


def test_a_refused_start_lets_the_folder_go(config: Config) -> None:
    begun(config)
    refused = make(replace(config, seed=4))
    with pytest.raises(ValueError, match="seed=0, not 4"):
        refused.open()
    opened(config).close()


def test_settings_of_other_stages_and_harmless_ones_may_change(config: Config) -> None:
    opened(config).close()
    harmless = Fit(**{**vars(config.cam.fit), "num_workers": 2, "log_every": 1,
                          "keep_checkpoints": 7,
                      "checkpoint_every": 5})  # fmt: skip
    other = replace(
        config,
        cam=replace(config.cam, fit=harmless),
        classifier=replace(config.classifier, dropout=0.9),
        data=replace(config.data, splits="moved/splits.json"),
    )
    opened(other).close()
    assert changed_keys(config, other, ("cam", "seed", "data")) == []
    assert changed_keys(config, other, ("classifier",)) == ["classifier.dropout=0.1, not 0.9"]


def test_a_single_setting_of_a_section_can_belong_to_a_stage() -> None:
    other = replace(CONFIG, diffusion=replace(CONFIG.diffusion, schedule="linear", num_timesteps=9))
    assert changed_keys(CONFIG, other, ("cam", "diffusion.schedule")) == [
        "diffusion.schedule='cosine', not 'linear'"
    ]


def test_metrics_are_cut_back_to_the_step_that_is_resumed_from(config: Config) -> None:
    run = opened(config)
    for step in range(1, 6):
        run.log(step, {"loss": 1 / step})
    run.close()
    again = opened(config)
    again.start_logging_from(3)
    again.log(4, {"loss": 9.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(again)] == [
        (1, 1),
        (2, 1 / 2),
        (3, 1 / 3),
        (4, 9),
    ]
    assert all(line["time"] > 1e9 for line in lines(again))


def test_half_a_line_left_by_a_kill_is_dropped(config: Config) -> None:
    run = opened(config)
    run.log(1, {"loss": 0.5})
    run.close()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    again = opened(config)
    again.start_logging_from(2)
    again.log(3, {"loss": 0.25})
    again.close()
    assert [line["step"] for line in lines(again)] == [1, 3]


def test_other_ranks_write_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = make(config)
    assert not run.is_main
    run.log(1, {"loss": 1.0})
    run.start_logging_from(0)
    run.finish({"x": 1})
    run.close()
    assert not run.folder.exists()


def test_every_start_leaves_its_provenance(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(config, "prepare").finish()
    opened(config).close()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run = opened(config)
    run.close()
    starts = json.loads((run.folder / "provenance.json").read_text())["starts"]
    assert [start["slurm_job"] for start in starts] == ["", "4711"]
    for start in starts:
        assert start["seed"] == config.seed
        assert start["processes"] == 1
        assert start["command"]
        assert {"commit", "dirty"} == set(start["git"])
        assert {"python", "torch", "numpy"} <= set(start["versions"])
        assert list(start["inputs"]) == ["prepare"]
        assert len(start["inputs"]["prepare"]) == 64


def test_a_stage_folder_keeps_its_identity_over_restarts(config: Config) -> None:
    first = opened(config)
    identity = first.id
    first.close()
    again = opened(config)
    assert again.id == identity
    again.close()
    other = opened(config, "cache")
    assert other.id != identity
    other.close()


def test_the_resolved_configuration_lies_in_the_folder(config: Config) -> None:
    run = opened(config)
    assert read_config(run.folder / "config.yaml") == config
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["cam"]["layer"] == Cam().layer
    run.close()


def test_seconds_add_up_over_the_starts(config: Config) -> None:
    run = opened(config)
    assert seconds_of(run.folder) == 0
    run.close()
    write_atomically(run.folder / "seconds.json", json.dumps({"seconds": 100.0}))
    again = opened(config)
    again.finish()
    assert 100 <= seconds_of(run.folder) < 200


def test_a_folder_that_cannot_be_made_is_explained(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = make(replace(config, runs=str(tmp_path / "file")))
    with pytest.raises(
        OSError, match=r"cannot write the run folder .*; choose another with runs=FOLDER"
    ):
        blocked.open()


def _keep_writing(path: Path, text: str, times: int) -> None:
    for _ in range(times):
        write_atomically(path, text)


def test_readers_of_an_atomic_write_see_the_old_or_the_new_whole(tmp_path: Path) -> None:
    path = tmp_path / "word.json"
    texts = {"a" * 100_000, "b" * 70_000}
    write_atomically(path, "a" * 100_000)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_keep_writing, args=(path, text, 10)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["word.json"], "nothing is left behind"


def test_a_stage_notices_that_its_input_was_made_again(config: Config) -> None:
    def stage(name: str, inputs: tuple[str, ...] = ()) -> Run:
        return Run(config, name, ("seed",), inputs)

    for run in (stage("prepare"), stage("train-cam", ("prepare",))):
        run.open()
        run.finish()
    stage("train-cam", ("prepare",)).check_unchanged()
    shutil.rmtree(config.run_folder / "prepare")
    again = stage("prepare")
    again.open()
    again.finish()
    with pytest.raises(ValueError, match="made from another prepare than the one there is now"):
        stage("train-cam", ("prepare",)).check_unchanged()


def test_the_proposed_command_leaves_out_what_belongs_to_another_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["cldf", "train-cam", "a b.yaml", "fit.steps=5", "seed=1"])
    assert command_for("prepare") == "cldf prepare 'a b.yaml' seed=1"
    monkeypatch.setattr("sys.argv", ["cldf", "segment", "c.yaml", "input=x", "output=y"])
    assert command_for("segment") == "cldf run c.yaml"
