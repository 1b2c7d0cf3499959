"""Processes that log to stages of one run; run by test_tracking.py.

`python tracked_stages.py together RUNS KILLED STAGE [...]`: a forked process for each stage, which
all start in the same instant and log the steps 1 to 3. The one called KILLED kills itself then,
before anything is sent.

`python tracked_stages.py again RUNS STAGE STEP [...]`: one process after the other, which goes on
from 5 to 9 steps before the last one and logs to step 60, with values sent all the time. It kills
itself after that step; the last one ends.
"""

import os
import signal
import sys
import time

from cldf_dist.config import Config, Data
from cldf_dist.runs import tracking
from cldf_dist.runs.run import Run
from cldf_dist.runs.tracking_store import import_mlflow

LAST_STEP = 60


def open_run(runs: str, stage: str) -> Run:
    return Run(Config(name="together", runs=runs, data=Data(dataset="phantom")), stage, ())


def log(runs: str, stage: str, start: float, killed: bool) -> None:
    run = open_run(runs, stage)
    time.sleep(max(0.0, start - time.time()))
    run.open()
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    run.finish()


def log_slowly(runs: str, stage: str, kill: int) -> None:
    """Log to the last step, or to the kill after another one."""
    tracking.SECONDS_BETWEEN_SENDS, tracking.BATCH = 0.005, 3
    run = open_run(runs, stage)
    run.open()
    lines = (run.folder / "metrics.jsonl").read_text().count("\n")
    step = max(lines // 5 * 5 - 5, 0)
    run.start_logging_from(step)
    while step < LAST_STEP:
        step += 1
        run.log(step, {"loss": float(step), "rate": 0.5})
        time.sleep(0.02)
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    run.finish()


def in_a_process(function, *words) -> int:
    child = os.fork()
    if child == 0:
        function(*words)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def together(runs: str, killed: str, *stages: str) -> bool:
    start = time.time() + 0.5
    children = [in_a_process(log, runs, stage, start, stage == killed) for stage in stages]
    expected = [-signal.SIGKILL if stage == killed else 0 for stage in stages]
    return [exit_code(child) for child in children] == expected


def again(runs: str, stage: str, *kills: str) -> bool:
    codes = [exit_code(in_a_process(log_slowly, runs, stage, int(kill))) for kill in (*kills, 0)]
    return codes == [*[-signal.SIGKILL] * len(kills), 0]


def main(mode: str, *words: str) -> int:
    import_mlflow("sqlite:///")  # once for all
    return 0 if {"together": together, "again": again}[mode](*words) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
