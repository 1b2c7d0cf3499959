"""From `sbatch` to the end of the first training step: slurm/stage.sbatch against a bare script.

Floor: a script of twenty lines (start_bare.py) that takes one step with accelerate, on as many
nodes, started by the same srun and launcher. Both are submitted in turns to a cluster that is
otherwise idle: without --running-cluster to the test cluster, one controller and two nodes on this
machine (needs slurm-wlm and root). Seconds of wall time; medians of the rounds, and of the
differences within a round. Rows are appended to --output.

    python benchmarks/bench_start.py
    python benchmarks/bench_start.py --running-cluster --folder /scratch/me/start
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from harness import ABOUT, Benchmark
from measure import alternate

COLUMNS = (
    *ABOUT,
    *("nodes", "rounds", "bare_s", "stage_s", "over_bare_s", "over_bare_max_s"),
    *("tracked_s", "tracked_over_bare_s"),  # the same with MLflow's local store
)
PACKAGES = ("torch", "triton", "monai", "accelerate", "xformers", "mlflow-skinny", "mlflow")
ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds
BARE = """#!/usr/bin/env bash
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 bash -c 'exec {python} \\
    -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" --config_file {hardware} \\
    --num_machines {nodes} --num_processes {nodes} --main_process_ip '"$address"' \\
    --main_process_port {port} {script} {output}'
"""


def main() -> None:
    """Measure, append a row."""
    bench = Benchmark(__file__, __doc__, COLUMNS, PACKAGES)
    bench.numbers(nodes=(2, "of a job"), rounds=(3, "of which the median counts"))
    bench.option("--warmup", type=int, default=1, help="rounds first, to read the files")
    bench.option("--running-cluster", action="store_true", help="submit to this one")
    bench.shared_options("folder")  # on a cluster one that all nodes see
    arguments = bench.parse()
    bench.begin()
    with bench.folder() as folder, _cluster(folder, arguments.running_cluster):
        seconds = _measure(folder, arguments.nodes, arguments.rounds, arguments.warmup)
    bare, stage, tracked = seconds.values()
    over = [more - less for more, less in zip(stage, bare, strict=True)]
    tracked_over = [more - less for more, less in zip(tracked, bare, strict=True)]
    bench.add(
        nodes=arguments.nodes,
        rounds=arguments.rounds,
        bare_s=statistics.median(bare),
        stage_s=statistics.median(stage),
        over_bare_s=statistics.median(over),
        over_bare_max_s=max(over),
        tracked_s=statistics.median(tracked),
        tracked_over_bare_s=statistics.median(tracked_over),
    )


def _measure(folder: Path, nodes: int, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of the bare script, of the stage, and of the stage with tracking."""
    config = str(ROOT / "configs" / "debug.yaml")
    words = [config, f"runs={folder}", "cam.fit.steps=1", "cam.fit.log_every=1"]
    untracked = "tracking.enabled=false"
    prepared = [sys.executable, "-m", "cldf_dist", "prepare", *words, untracked, "name=prepared"]
    subprocess.run(prepared, cwd=ROOT, check=True, capture_output=True)
    jobs = count()
    calls = {
        "bare": lambda: _bare(folder, nodes, next(jobs)),
        "stage": lambda: _stage(folder, nodes, next(jobs), [*words, untracked]),
        "tracked": lambda: _stage(folder, nodes, next(jobs), words),
    }
    return alternate(calls, rounds, warmup)


def _bare(folder: Path, nodes: int, number: int) -> float:
    output, script = folder / f"bare{number}", folder / f"bare{number}.sbatch"
    script.write_text(
        BARE.format(
            nodes=nodes,
            python=sys.executable,
            hardware=ROOT / "configs" / "accelerate" / "cpu.yaml",
            port=41000 + number,
            script=ROOT / "benchmarks" / "start_bare.py",
            output=output,
        )
    )
    begin = time.time()
    _run_job(output, folder, nodes, str(script))
    return float(output.read_text()) - begin


def _stage(folder: Path, nodes: int, number: int, words: list[str]) -> float:
    name = f"stage{number}"
    (folder / name).mkdir()
    (folder / name / "prepare").symlink_to(folder / "prepared" / "prepare")
    metrics = folder / name / "train-cam" / "metrics.jsonl"
    begin = time.time()
    _run_job(metrics, folder, nodes, "slurm/stage.sbatch", "train-cam", *words, f"name={name}")
    first = json.loads(metrics.read_text().splitlines()[0])
    return float(first["time"]) - begin


def _run_job(output: Path, folder: Path, nodes: int, *words: str) -> None:
    """Submit a job; returns when its output holds something and no job is left."""
    submit = ["sbatch", f"--output={folder}/job-%j.log", f"--nodes={nodes}", *words]
    run = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True, text=True)
    run(submit)
    until = time.monotonic() + PATIENCE
    while (
        not (output.exists() and output.stat().st_size)
        or run(["squeue", "--noheader", "--me"]).stdout.strip()
    ):
        if time.monotonic() > until:
            logs = sorted(folder.rglob("job-*.log"))
            raise TimeoutError(f"no {output}: {logs[-1].read_text() if logs else 'not started'}")
        time.sleep(0.2)


@contextmanager
def _cluster(folder: Path, running: bool) -> Iterator[None]:
    """Environment variables that lead to a cluster; the test cluster is started for it."""
    os.environ["CLDF_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    os.environ["OMP_NUM_THREADS"] = "1"
    if running:
        yield
        return
    script = str(ROOT / "tests" / "slurm" / "cluster.sh")
    variables = folder / "cluster.env"
    variables.write_text("")
    os.environ.update(SLURM_CONF=str(folder / "slurm.conf"), CLDF_CLUSTER_ENV=str(variables))
    subprocess.run([script, "start", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([script, "stop", str(folder)], check=False, capture_output=True)


if __name__ == "__main__":
    main()
