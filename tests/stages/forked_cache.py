"""Many starts of the cache stage, by fork: torch is imported only once.

    python tests/stages/forked_cache.py '[{"words": ["configs/debug.yaml", ...], "ranks": 2}]'

Prints one JSON line per start: the ranks' exit codes (negative: the signal that killed it). With
"kills" and "store" the stage is started and killed that often, each time at a random moment after
one more shard was finished or begun, and then started once more.
"""

import contextlib
import json
import os
import random
import socket
import sys
import time
import traceback
from pathlib import Path

import accelerate  # noqa: F401  # before the fork, as all that the first start imports
import omegaconf.vendor  # noqa: F401

from cldf_dist.__main__ import main
from cldf_dist.stages import stage_named

PATIENCE = 60.0  # seconds, then what still runs hangs


def start(words: list[str], ranks: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {}
    if ranks > 1:
        environment = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    children = [_fork(words, environment, rank) for rank in range(ranks)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_often(words: list[str], store: Path, kills: int) -> int:
    """The number of kills that found the stage at work."""
    chance, killed = random.Random(0), 0
    for _ in range(kills):
        child = _fork(words, {}, 0)
        enough, began = _finished(store) + chance.choice([0, 1, 1]), time.monotonic()
        while _finished(store) < enough and time.monotonic() - began < PATIENCE:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, 9)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    return killed


def _finished(store: Path) -> int:
    folder = store / "done" / "c"
    return len([p for p in folder.iterdir() if p.name.isdigit()]) if folder.exists() else 0


def _fork(words: list[str], environment: dict[str, str], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        if environment:
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            os.environ.update({**environment, **ranks})
        sys.stdout = sys.stderr
        code = main(["cache", *words])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    stage_named("cache").module  # noqa: B018
    for described in json.loads(sys.argv[1]):
        words = described["words"]
        result: dict[str, object] = {}
        if "kills" in described:
            result["killed"] = kill_often(words, Path(described["store"]), described["kills"])
        print(json.dumps({**result, "codes": start(words, described.get("ranks", 1))}), flush=True)
