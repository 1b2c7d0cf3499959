"""What a run asks of a file system: its system calls about files, counted by strace.

A metadata server sees each of them: opening, making, looking, renaming, removing, listing, syncing.
Calls are told apart by their path: the feature store, checkpoints, what else is in the run's
folder, and everything outside of it, which is Python's imports.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

KINDS = {  # of system calls, by what they do
    "open": ("open", "openat", "openat2", "creat"),
    "stat": (
        "stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat", "faccessat2",
        "readlink", "readlinkat", "statfs",
    ),
    "list": ("getdents", "getdents64"),
    "make folder": ("mkdir", "mkdirat"),
    "rename": ("rename", "renameat", "renameat2", "link", "linkat"),
    "remove": ("unlink", "unlinkat", "rmdir"),
    "sync": ("fsync", "fdatasync"),
    "lock": ("flock",),
}  # fmt: skip
KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls}
CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$")
PATH = re.compile(r'"([^"]*)"|<(/[^>]*)>')
STORE, CHECKPOINTS, RUN, OUTSIDE = "store", "checkpoints", "run folder", "outside"

Counts = Counter[tuple[str, str]]  # by place and kind of call


def can_count() -> bool:
    return shutil.which("strace") is not None


def count_calls(
    command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]
) -> Counts:
    """The calls of a command and its children, by place; `folder` is the run's.

    Raises RuntimeError where the command fails.
    """
    traced = ",".join(f"?{call}" for call in sorted(KIND_OF))  # not every machine has all
    watch = ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-o", str(log), "-e", f"trace={traced}"]
    done = subprocess.run(
        [*watch, *command], env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    with log.open(errors="replace") as lines:
        return sort_calls(lines, folder)


def sort_calls(lines: Iterable[str], folder: Path) -> Counts:
    """Calls of a log of strace, without those of which only the end stands in a line."""
    counts: Counts = Counter()
    for line in lines:
        found = CALL.match(line)
        if found is None or found[1] not in KIND_OF or "resumed>" in line:
            continue
        paths = ["".join(pair) for pair in PATH.findall(found[2])]
        if paths:
            counts[_place(_joined(paths), str(folder)), KIND_OF[found[1]]] += 1
    return counts


def _joined(paths: Sequence[str]) -> str:
    """The path of a call: relative to a folder's descriptor, where it names one."""
    first = paths[0]
    if len(paths) > 1 and first.startswith("/") and not paths[1].startswith("/"):
        return f"{first}/{paths[1]}"
    return next((path for path in paths if path.startswith("/") and path != first), first)


def _place(path: str, folder: str) -> str:
    if not path.startswith(folder):
        return OUTSIDE
    inside = path.removeprefix(folder)
    if "features.zarr" in inside:
        return STORE
    return CHECKPOINTS if "/checkpoints" in inside else RUN
