"""What several tests share: the debug pipeline, run once, and the command line in a process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers share the cores

import fcntl
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

INTERPRET = "TRITON_INTERPRET"  # Triton reads it when it is imported first


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels are interpreted, but compiled for a device by `make test-gpu`; Ctrl-C is
    what it is in a terminal."""
    if config.option.markexpr != "gpu":
        os.environ[INTERPRET] = "1"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


ROOT = Path(__file__).resolve().parents[1]
DEBUG = str(ROOT / "configs" / "debug.yaml")


@dataclass(frozen=True)
class DebugRun:
    """A run of the debug configuration in a folder of runs of its own."""

    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / "debug"

    @property
    def words(self) -> list[str]:
        """What follows the stage's name on the command line."""
        return [DEBUG, f"runs={self.runs}", "tracking.enabled=false"]

    def copy_to(self, runs: Path, *stages: str) -> "DebugRun":
        """The same run in another folder, with these stages alone."""
        for stage in stages:
            shutil.copytree(self.folder / stage, runs / "debug" / stage)
        return DebugRun(runs)


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> DebugRun:
    """The whole debug pipeline, finished. Read-only: take a copy to change anything."""
    from cldf_dist.__main__ import main

    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    run = DebugRun(folder / "debug_run")
    with (folder / "debug_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first test worker computes, the others find it done
        assert main(["run", *run.words]) == 0
    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a process that has only this checkout and one thread."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "SLURM_"))
        and name not in ("RANK", "WORLD_SIZE", INTERPRET)
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Start `python WORDS`; what still runs when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_python(
        *words: str, start_new_session: bool = False, **changes: str
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *words],
            env={**environment, **changes},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=start_new_session,
        )
        started.append(process)
        return process

    yield start_python
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def interrupt_when() -> Callable[[Callable[[], bool]], None]:
    """Press Ctrl-C in this very process as soon as a claim becomes true."""

    def watch(claim: Callable[[], bool]) -> None:
        def press() -> None:
            while not claim():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press, daemon=True).start()

    return watch


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for a claim to become true while a process lives; fails with what the process said."""

    def wait(
        claim: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 240
    ) -> None:
        deadline = time.monotonic() + seconds
        while not claim():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail("\n".join(process.communicate()))
            time.sleep(0.02)

    return wait
