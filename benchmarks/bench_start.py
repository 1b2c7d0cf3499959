"""From `sbatch` to the end of the first training step: slurm/stage.sbatch against a bare script.

Floor: a script of twenty lines (start_bare.py) that takes one step with accelerate, on as many
nodes, started by the same srun and launcher. Both are submitted in turns to a cluster that is
otherwise idle: without --running-cluster to the test cluster, one controller and two nodes on this
machine (needs slurm-wlm and root). Seconds of wall time; medians of the rounds, and of the
differences within a round. Rows are appended to --output.

    python benchmarks/bench_start.py
    python benchmarks/bench_start.py --running-cluster --folder /scratch/me/start
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from train_results import Circumstances, append_rows, check_columns, circumstances

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "start.csv"
PATIENCE = 300.0  # seconds
BARE = """#!/usr/bin/env bash
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export {variables}
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 bash -c 'exec {python} \\
    -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" --config_file {hardware} \\
    --num_machines {nodes} --num_processes {nodes} --main_process_ip '"$address"' \\
    --main_process_port {port} {script} {output}'
"""


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV."""

    nodes: int
    rounds: int
    bare_s: float
    stage_s: float
    over_bare_s: float
    over_bare_max_s: float
    tracked_s: float  # the same with MLflow's local store
    tracked_over_bare_s: float


def main() -> None:
    """Measure, print, append a row."""
    arguments = _parse_arguments()
    check_columns(arguments.output, Row)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        _cluster(Path(folder), arguments.running_cluster),
    ):
        row = _measure(Path(folder), arguments.nodes, arguments.rounds, arguments.warmup)
    for name, value in asdict(row).items():
        if name.endswith("_s"):
            print(f"{name:<20} {value:6.1f}")
    append_rows(arguments.output, [row])


def _measure(folder: Path, nodes: int, rounds: int, warmup: int) -> Row:
    config = str(ROOT / "configs" / "debug.yaml")
    words = [config, f"runs={folder}", "cam.fit.steps=1", "cam.fit.log_every=1"]
    prepared = [sys.executable, "-m", "cldf_dist", "prepare", *words, "tracking.enabled=false"]
    subprocess.run([*prepared, "name=prepared"], cwd=ROOT, check=True, capture_output=True)
    bare, stage, tracked = [], [], []
    for number in range(warmup + rounds):
        bare.append(_bare(folder, nodes, number))
        stage.append(_stage(folder, nodes, f"plain{number}", [*words, "tracking.enabled=false"]))
        tracked.append(_stage(folder, nodes, f"tracked{number}", words))
    bare, stage, tracked = bare[warmup:], stage[warmup:], tracked[warmup:]
    over = [mine - least for mine, least in zip(stage, bare, strict=True)]
    tracked_over = [mine - least for mine, least in zip(tracked, bare, strict=True)]
    return Row(
        **asdict(circumstances(torch.device("cpu"), script="bench_start.py")),
        nodes=nodes,
        rounds=rounds,
        bare_s=round(statistics.median(bare), 2),
        stage_s=round(statistics.median(stage), 2),
        over_bare_s=round(statistics.median(over), 2),
        over_bare_max_s=round(max(over), 2),
        tracked_s=round(statistics.median(tracked), 2),
        tracked_over_bare_s=round(statistics.median(tracked_over), 2),
    )


def _bare(folder: Path, nodes: int, number: int) -> float:
    output = folder / f"bare{number}"
    script = folder / f"bare{number}.sbatch"
    script.write_text(
        BARE.format(
            variables="OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true",
            nodes=nodes,
            python=sys.executable,
            hardware=ROOT / "configs" / "accelerate" / "cpu.yaml",
            port=41000 + number,
            script=ROOT / "benchmarks" / "start_bare.py",
            output=output,
        )
    )
    begin = time.time()
    _submit(folder, f"--nodes={nodes}", str(script))
    _wait_for(output)
    return float(output.read_text()) - begin


def _stage(folder: Path, nodes: int, name: str, words: list[str]) -> float:
    (folder / name).mkdir()
    (folder / name / "prepare").symlink_to(folder / "prepared" / "prepare")
    metrics = folder / name / "train-cam" / "metrics.jsonl"
    begin = time.time()
    _submit(folder, f"--nodes={nodes}", "slurm/stage.sbatch", "train-cam", *words, f"name={name}")
    _wait_for(metrics)
    first = float(json.loads(metrics.read_text().splitlines()[0])["time"])
    return first - begin


def _submit(folder: Path, *words: str) -> None:
    """Submit a job and come back when nothing of it is needed any more: the next one waits."""
    output = f"--output={folder}/job-%j.log"
    subprocess.run(["sbatch", output, *words], cwd=ROOT, check=True, capture_output=True)


def _wait_for(path: Path) -> None:
    """Wait until a file holds something and no job is left."""
    until = time.monotonic() + PATIENCE
    while not (path.exists() and path.stat().st_size) or _queued():
        if time.monotonic() > until:
            logs = sorted(path.parent.rglob("job-*.log"))
            raise TimeoutError(f"no {path}: {logs[-1].read_text() if logs else 'no job started'}")
        time.sleep(0.2)


def _queued() -> bool:
    words = ["squeue", "--noheader", "--me"]
    return bool(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())


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
    (folder / "cluster.env").write_text("")
    os.environ.update(
        SLURM_CONF=str(folder / "slurm.conf"), CLDF_CLUSTER_ENV=str(folder / "cluster.env")
    )
    subprocess.run([script, "start", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([script, "stop", str(folder)], check=False, capture_output=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds first, to read the files")
    parser.add_argument("--folder", help="for runs and logs; on a cluster one that all nodes see")
    parser.add_argument("--running-cluster", action="store_true", help="submit to this one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
