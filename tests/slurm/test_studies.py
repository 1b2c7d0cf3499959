"""Whole studies on a real controller with two nodes: the pipeline, and preemption."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster

from cldf_dist.stages import STAGES

STAGE = "slurm/stage.sbatch"
LONG = ["diffusion.fit.steps=120", "classifier.fit.steps=120", "decoder.fit.steps=400"]
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def study(cluster: Cluster, debug_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The debug study by pipeline.sh, distributed stages on two nodes, the cache as an array."""
    folder = tmp_path_factory.mktemp("study")
    run = debug_run.copy_to(folder)
    settings = folder / "cluster.env"
    settings.write_text(
        f'CLDF_SBATCH="--nodes=2 --output={folder}/%x-%A-%a.log"\n'
        f'CLDF_SBATCH_ONE_NODE="--nodes=1 --output={folder}/%x-%j.log"\n'
        "CLDF_CACHE_PARTS=2\n"
    )
    words = [*run.words, *LONG]
    planned = cluster.run("slurm/pipeline.sh", "--dry-run", *words, CLDF_CLUSTER_ENV=str(settings))
    assert planned.returncode == 0, planned.stderr
    assert len(planned.stdout.splitlines()) == 1 + len(STAGES)
    assert not run.folder.exists()
    submitted = cluster.run("slurm/pipeline.sh", *words, CLDF_CLUSTER_ENV=str(settings))
    assert submitted.returncode == 0, submitted.stderr
    assert "--array=1,2" in submitted.stdout
    jobs = {line.split()[0]: line.split()[2] for line in submitted.stdout.splitlines()[1:]}
    at_once = cluster.run("slurm/pipeline.sh", *words, CLDF_CLUSTER_ENV=str(settings))
    assert {line.split()[1] for line in at_once.stdout.splitlines()[1:]} <= {"queued", "finished"}
    for stage, job in jobs.items():
        about = cluster.ended(job)
        log = "".join(path.read_text() for path in folder.glob(f"cldf-{stage}-*.log"))
        assert about["JobState"] == "COMPLETED", f"{stage}: {log[-3000:]}"
    again = cluster.run("slurm/pipeline.sh", *words, CLDF_CLUSTER_ENV=str(settings))
    assert {line.split()[1] for line in again.stdout.splitlines()[1:]} == {"finished"}
    return run


def test_the_pipeline_runs_to_its_report_and_submits_only_what_is_missing(study: Any) -> None:
    assert (study.folder / "report" / "report.html").stat().st_size
    assert json.loads((study.folder / "cache" / "DONE").read_text())["slices"] == 54
    assert (study.folder / "cache" / "parts" / "2-of-2" / "DONE").exists()


def test_a_study_that_is_preempted_three_times_ends_bit_identical(
    cluster: Cluster, debug_run: Any, tmp_path: Path, study: Any
) -> None:
    """By its time limit, by scontrol, and by the signal that comes before a limit; each time it
    is requeued, and in the end every net, map, mask and score is that of the pipeline's jobs."""
    run = debug_run.copy_to(tmp_path)
    # SLURM looks at limits every half minute, and then sends the signal two minutes ahead
    job = cluster.submit("--nodes=2", "--time=2", STAGE, "run", *run.words, *LONG)

    def restarted(start: int) -> None:
        cluster.wait_for(job, lambda: f"start {start}: run" in cluster.log(job))

    cluster.wait_for(job, lambda: "asked to stop; requeueing" in cluster.log(job))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    restarted(2)
    wait_for_text(cluster, job, run.folder / "train-classifier" / "metrics.jsonl")
    cluster.run("scontrol", "requeue", job)
    restarted(3)
    wait_for_text(cluster, job, run.folder / "train-decoder" / "metrics.jsonl")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    restarted(4)
    about = cluster.ended(job)
    assert (about["JobState"], about["Restarts"]) == ("COMPLETED", "3"), cluster.log(job)[-3000:]
    starts = json.loads((run.folder / "train-decoder" / "provenance.json").read_text())["starts"]
    assert [start["slurm_job"] for start in starts] == [job, job]
    mine, theirs = digests(run.folder), digests(study.folder)
    assert len(theirs) > 60
    assert {name for name in theirs if mine.get(name) != theirs[name]} == set()


def wait_for_text(cluster: Cluster, job: str, metrics: Path) -> None:
    """Wait until a training has logged some steps."""
    cluster.wait_for(job, lambda: metrics.exists() and len(metrics.read_text()) > 1000)


def digests(folder: Path) -> dict[str, str]:
    """What a study leaves: nets, caches, masks and scores, without their bookkeeping."""
    kept = (".safetensors", ".nii.gz", ".csv", "summary.json")
    files = [path for path in folder.rglob("*") if path.name.endswith(kept)]
    store = folder / "cache" / "features.zarr"
    files += [path for path in store.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "checkpoints" not in path.parts and path != store / "zarr.json"  # names the run
    }
