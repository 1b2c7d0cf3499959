"""Jobs of one stage on a real controller with two nodes, CPU only."""

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from slurm_cluster import Cluster, kill_a_rank

STAGE = "slurm/stage.sbatch"
TWO_NODES = "--nodes=2"
pytestmark = pytest.mark.slurm


def finished(run: Any, stage: str) -> dict[str, Any]:
    word: dict[str, Any] = json.loads((run.folder / stage / "DONE").read_text())
    return word


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / "net.safetensors")
    return found


@pytest.mark.parametrize("hardware", ["", "configs/accelerate/zero2.yaml"], ids=["ddp", "zero2"])
def test_a_training_on_two_nodes_is_that_on_one_process(
    cluster: Cluster, debug_run: Any, tmp_path: Path, hardware: str
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    chosen = {"ACCELERATE_CONFIG": hardware} if hardware else {}
    job = cluster.submit(TWO_NODES, STAGE, "train-cam", *run.words, **chosen)
    about = cluster.ended(job)
    assert about["JobState"] == "COMPLETED", cluster.log(job)[-3000:]
    starts = json.loads((run.folder / "train-cam" / "provenance.json").read_text())["starts"]
    assert [(start["processes"], start["slurm_job"]) for start in starts] == [(2, job)]
    mine, theirs = (weights(r.folder / "train-cam") for r in (run, debug_run))
    for name in theirs:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-2, atol=2e-3, err_msg=name)


def test_a_refused_requeue_is_told_by_its_exit_code(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    words = ["--no-requeue", STAGE, "train-cam", *run.words, "cam.fit.steps=5000"]
    job = cluster.submit(*words)
    wait_for_lines(cluster, job, run.folder / "train-cam" / "metrics.jsonl", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    about = cluster.ended(job)
    assert about["ExitCode"] == "75:0", cluster.log(job)[-3000:]
    assert "SLURM did not requeue job" in cluster.log(job)
    assert list((run.folder / "train-cam" / "checkpoints").iterdir()), "all is saved"


def test_a_job_that_is_asked_to_stop_as_it_starts_does_not_fail(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    """It is requeued, or has finished before the signal is sent again."""
    run = debug_run.copy_to(tmp_path)
    job = cluster.submit(STAGE, "prepare", *run.words)
    cluster.wait_for(job, lambda: bool(list(cluster.folder.glob(f"job-{job}.log"))))
    time.sleep(0.2)  # bash is there, and asks for the stage's files
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.ended(job)["JobState"] == "COMPLETED", cluster.log(job)[-3000:]


def test_a_killed_rank_ends_the_job(cluster: Cluster, debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    job = cluster.submit(TWO_NODES, STAGE, "train-cam", *run.words, "cam.fit.steps=5000")
    wait_for_lines(cluster, job, run.folder / "train-cam" / "metrics.jsonl", 2)
    assert kill_a_rank(["train-cam", f"runs={run.runs}"])
    about = cluster.ended(job)
    assert about["JobState"] == "FAILED"
    assert not (run.folder / "train-cam" / "DONE").exists()


def test_a_failing_stage_takes_those_behind_it_along(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path)
    settings = tmp_path / "cluster.env"
    settings.write_text(
        f'CLDF_SBATCH="--output={tmp_path}/%x.log"\nCLDF_SBATCH_ONE_NODE="--output={tmp_path}/%x.log"\n'
    )
    words = ["slurm/pipeline.sh", *run.words, "data.splits=/nowhere.json"]
    submitted = cluster.run(*words, CLDF_CLUSTER_ENV=str(settings))
    assert submitted.returncode == 0, submitted.stderr
    jobs = [line.split()[2] for line in submitted.stdout.splitlines()[1:]]
    assert cluster.ended(jobs[0])["JobState"] == "FAILED"
    assert "/nowhere.json" in (tmp_path / "cldf-prepare.log").read_text()
    assert {cluster.ended(job)["JobState"] for job in jobs[1:]} == {"CANCELLED"}


def test_a_killed_element_of_an_array_is_submitted_alone(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(
        tmp_path,
        *(
            "prepare",
            "train-diffusion",
            "tune-label-embedding",
            "train-classifier",
            "train-cam",
            "train-patch-classifier",
        ),
    )
    words = [STAGE, "cache", *run.words, "cache.part=task/3"]
    job = cluster.submit("--array=1-3", *words)
    mine = ["cache.part=2/3", f"runs={run.runs}"]
    cluster.wait_for(f"{job}_2", lambda: kill_a_rank(mine))
    states = {number: cluster.ended(f"{job}_{number}")["JobState"] for number in (1, 2, 3)}
    assert states == {1: "COMPLETED", 2: "FAILED", 3: "COMPLETED"}, cluster.log(job)[-3000:]
    assert not (run.folder / "cache" / "DONE").exists()
    again = cluster.submit("--array=2", *words)
    assert cluster.ended(again)["JobState"] == "COMPLETED", cluster.log(again)[-3000:]
    assert finished(run, "cache")["slices"] == 54


def test_a_wrong_partition_is_refused_by_sbatch(cluster: Cluster, debug_run: Any) -> None:
    done = cluster.run("sbatch", "--partition=nowhere", STAGE, "train-cam", *debug_run.words)
    assert done.returncode != 0
    assert "invalid partition" in done.stderr


def test_the_doctor_sees_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(TWO_NODES, STAGE, "doctor", f"runs={tmp_path}")
    assert cluster.ended(job)["JobState"] == "COMPLETED", cluster.log(job)[-3000:]
    log = cluster.log(job)
    assert "2 rank(s), each there once: n1 x 1, n2 x 1" in log
    assert f"job {job}: 2 node(s)" in log


def test_the_benchmark_of_the_start_runs_and_appends_its_row(
    cluster: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "start.csv"
    words = ["benchmarks/bench_start.py", "--running-cluster", "--rounds=1", "--warmup=0"]
    done = cluster.run(sys.executable, *words, f"--folder={tmp_path}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(output.read_text().splitlines())
    assert float(row["bare_s"]) > 0
    assert float(row["stage_s"]) > 0


def wait_for_lines(cluster: Cluster, job: str, metrics: Path, count: int) -> None:
    cluster.wait_for(
        job, lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= count
    )
