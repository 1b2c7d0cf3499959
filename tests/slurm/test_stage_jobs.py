"""The batch scripts on a real controller with two nodes, CPU only: `make test-slurm`."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from slurm_cluster import Cluster

STAGE = "slurm/stage.sbatch"
TWO_NODES = "--nodes=2"
pytestmark = pytest.mark.slurm


def finished(run: Any, stage: str) -> dict[str, Any]:
    word: dict[str, Any] = json.loads((run.folder / stage / "DONE").read_text())
    return word


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / "net.safetensors")
    return found


def test_the_pipeline_runs_to_its_report_and_submits_only_what_is_missing(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    """The whole chain on two nodes, the cache as an array."""
    run = debug_run.copy_to(tmp_path)
    settings = tmp_path / "cluster.env"
    settings.write_text(
        f'CLDF_SBATCH="--nodes=2 --output={tmp_path}/%x-%A-%a.log"\n'
        f'CLDF_SBATCH_ONE_NODE="--nodes=1 --output={tmp_path}/%x-%j.log"\n'
        "CLDF_CACHE_PARTS=2\n"
    )
    words = ["slurm/pipeline.sh", *run.words]
    planned = cluster.run(words[0], "--dry-run", *words[1:], CLDF_CLUSTER_ENV=str(settings))
    assert planned.returncode == 0, planned.stderr
    assert len(planned.stdout.splitlines()) == 10
    assert not run.folder.exists()
    submitted = cluster.run(*words, CLDF_CLUSTER_ENV=str(settings))
    assert submitted.returncode == 0, submitted.stderr
    jobs = {line.split()[0]: line.split()[2] for line in submitted.stdout.splitlines()[1:]}
    assert "--array=1,2" in submitted.stdout
    for stage, job in jobs.items():
        about = cluster.ended(job)
        log = "".join(path.read_text() for path in tmp_path.glob(f"cldf-{stage}-*.log"))
        assert about["JobState"] == "COMPLETED", f"{stage}: {log[-3000:]}"
    assert "report.html" in str(list((run.folder / "report").iterdir()))
    assert finished(run, "cache")["slices"] == 54
    assert (run.folder / "cache" / "parts" / "2-of-2" / "DONE").exists()
    again = cluster.run(*words, CLDF_CLUSTER_ENV=str(settings))
    assert {line.split()[1] for line in again.stdout.splitlines()[1:]} == {"finished"}


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


def test_a_job_that_is_requeued_ends_with_the_same_weights(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    """Asked to stop by USR1 three times, as SLURM does before a time limit."""
    runs = [debug_run.copy_to(tmp_path / name, "prepare") for name in ("whole", "stopped")]
    long = ["cam.fit.steps=600", "cam.fit.checkpoint_every=1000", "cam.fit.log_every=20"]
    whole = cluster.submit(TWO_NODES, STAGE, "train-cam", *runs[0].words, *long)
    assert cluster.ended(whole)["JobState"] == "COMPLETED", cluster.log(whole)[-3000:]
    job = cluster.submit(TWO_NODES, STAGE, "train-cam", *runs[1].words, *long)
    metrics = runs[1].folder / "train-cam" / "metrics.jsonl"
    for start in range(3):
        cluster.wait_for(job, f"start {start + 1}: train-cam")
        wait_for_lines(cluster, job, metrics, 3 * (start + 1))
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for(job, f"start {start + 2}: train-cam")
    about = cluster.ended(job)
    assert (about["JobState"], about["Restarts"]) == ("COMPLETED", "3"), cluster.log(job)[-3000:]
    mine, theirs = (weights(run.folder / "train-cam") for run in runs)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    starts = json.loads((runs[1].folder / "train-cam" / "provenance.json").read_text())["starts"]
    assert len(starts) == 4


def wait_for_lines(cluster: Cluster, job: str, metrics: Path, count: int) -> None:
    until = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < until, cluster.log(job)[-3000:]
        time.sleep(0.05)


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


def test_a_killed_rank_ends_the_job(cluster: Cluster, debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    job = cluster.submit(TWO_NODES, STAGE, "train-cam", *run.words, "cam.fit.steps=5000")
    wait_for_lines(cluster, job, run.folder / "train-cam" / "metrics.jsonl", 2)
    found = re.findall(rf"^(\d+) .*python.*cldf_dist train-cam.*{run.runs}", ranks(cluster), re.M)
    assert found
    cluster.run("kill", "-9", found[-1])
    about = cluster.ended(job)
    assert about["JobState"] == "FAILED"
    assert not (run.folder / "train-cam" / "DONE").exists()


def ranks(cluster: Cluster) -> str:
    """Number and command of every process that is no launcher."""
    lines = cluster.run("ps", "-eo", "pid=,args=").stdout.splitlines()
    launchers = ("accelerate", "bash", "srun", "pytest")
    kept = [line.strip() for line in lines if not any(word in line for word in launchers)]
    return "\n".join(kept)


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


def test_a_failed_element_of_an_array_is_submitted_alone(
    cluster: Cluster, debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare", "train-diffusion", "train-classifier", "train-cam")
    words = [STAGE, "cache", *run.words, "cache.part=task/3"]
    job = cluster.submit("--array=1-3", "--begin=now+60", *words)
    cluster.run("scancel", f"{job}_2")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.ended(f"{job}_1")
    cluster.ended(f"{job}_3")
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
