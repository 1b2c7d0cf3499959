"""Jobs on the test cluster: submit them, wait for them, read their logs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds, for anything to happen
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Cluster:
    """Jobs of the two nodes, each with the environment of this checkout."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            words, env={**self.environment, **more}, cwd=ROOT, text=True, capture_output=True
        )

    def submit(self, *words: str, **more: str) -> str:
        """The job's number; `words` are those of sbatch, its log lies in the cluster's folder."""
        output = f"--output={self.folder}/job-%A_%a.log" if any(
            word.startswith("--array") for word in words
        ) else f"--output={self.folder}/job-%j.log"  # fmt: skip
        done = self.run("sbatch", "--parsable", output, *words, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def log(self, job: str) -> str:
        return "".join(p.read_text() for p in sorted(self.folder.glob(f"job-{job}*.log")))

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job; of an array's first record."""
        said = self.run("scontrol", "show", "job", "-o", job).stdout.splitlines()[0]
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def ended(self, job: str) -> dict[str, str]:
        """Wait until a job has ended for good; what scontrol says of it then."""
        until = time.monotonic() + PATIENCE
        while True:
            about = self.show(job)
            queued = self.run("squeue", "-h", "-j", job).stdout.strip()
            if about["JobState"] in ENDED and not queued:
                return about
            if time.monotonic() > until:
                pytest.fail(f"job {job} is {about['JobState']} still:\n{self.log(job)[-3000:]}")
            time.sleep(0.3)

    def wait_for(self, job: str, claim: Callable[[], bool]) -> None:
        """Wait until a claim is true, while the job has not ended."""
        until = time.monotonic() + PATIENCE
        while not claim():
            if time.monotonic() > until or self.show(job)["JobState"] in ENDED:
                pytest.fail(f"waiting in vain for job {job}:\n{self.log(job)[-3000:]}")
            time.sleep(0.05)


def kill_a_rank(words: list[str]) -> bool:
    """SIGKILL for one process of the program whose command line has all `words`; True if found."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            is_launcher = "accelerate.commands.launch" in command or "bash" in command[0]
            if "-m" in command and not is_launcher and set(words) <= set(command):
                os.kill(int(folder.name), signal.SIGKILL)
                return True
    return False
