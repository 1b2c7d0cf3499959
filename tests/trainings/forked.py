"""Many starts of the tiny training on one or more ranks, by fork: torch is imported only once.

    python tests/trainings/forked.py RUNS '[{"ranks": 2, "zero": 0, "scenarios": ["NAME kill=4"]}]'

Prints one JSON line per start: the ranks' exit codes (negative: the signal that killed it), what
they printed, and the seconds it took.
"""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # before the fork, as all that the first step imports
import omegaconf.vendor  # noqa: F401
import tiny
import torch._dynamo
import torch._inductor  # noqa: F401

PATIENCE = 60.0  # seconds, then what still runs hangs


def start(runs: str, ranks: int, zero: int, scenarios: list[str]) -> dict[str, Any]:
    began = time.monotonic()
    log = Path(runs) / "output.txt"
    log.write_text("")
    environment = _environment(ranks, zero)
    children = [_fork(runs, {**environment, "RANK": str(r)}, log, scenarios) for r in range(ranks)]
    codes: list[int | None] = [None] * ranks
    while None in codes and time.monotonic() - began < PATIENCE:
        for rank, child in enumerate(children):
            if codes[rank] is None:
                pid, status = os.waitpid(child, os.WNOHANG)
                codes[rank] = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.01)
    for rank, child in enumerate(children):
        if codes[rank] is None:
            os.kill(child, 9)
            os.waitpid(child, 0)
    seconds = time.monotonic() - began
    return {"codes": codes, "output": log.read_text(), "seconds": seconds}


def _environment(ranks: int, zero: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if zero:
        stage = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
        return words | stage
    return words | {"ACCELERATE_USE_CPU": "true"}


def _fork(runs: str, environment: dict[str, str], log: Path, scenarios: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update({**environment, "LOCAL_RANK": environment["RANK"]})
        with log.open("a", buffering=1) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = tiny.main(runs, *scenarios)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for described in json.loads(sys.argv[2]):
        zero = described.get("zero", 0)
        if zero:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
            import transformers.integrations.deepspeed  # noqa: F401
        result = start(sys.argv[1], described["ranks"], zero, described["scenarios"])
        print(json.dumps(result), flush=True)
