"""Processes that open stages of one run in the same instant; run by test_tracking.py.

`python tracked_stages.py RUNS KILLED STAGE [...]`: a forked process for each stage, which logs the
steps 1 to 3. The one called KILLED kills itself then, before anything is sent.
"""

import os
import signal
import sys
import time

from cldf_dist.config import Config, Data
from cldf_dist.runs.run import Run
from cldf_dist.runs.tracking_store import prepare_mlflow


def log(runs: str, stage: str, start: float, killed: bool) -> None:
    run = Run(Config(name="together", runs=runs, data=Data(dataset="phantom")), stage, ())
    time.sleep(max(0.0, start - time.time()))
    run.open()
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    run.finish()


def main(runs: str, killed: str, *stages: str) -> int:
    prepare_mlflow("sqlite:///")  # once for all
    start = time.time() + 0.5
    children = []
    for stage in stages:
        child = os.fork()
        if child == 0:
            log(runs, stage, start, stage == killed)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    expected = [-signal.SIGKILL if stage == killed else 0 for stage in stages]
    return 0 if codes == expected else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
