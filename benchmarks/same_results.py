"""Shows that a refactor changed no result: sha256 of all that configs/debug.yaml computes.

    python benchmarks/same_results.py                          # compare with the published baseline
    python benchmarks/same_results.py --write /tmp/before.csv  # a baseline of this commit, this CPU
    python benchmarks/same_results.py --against /tmp/before.csv

The debug pipeline runs once on one process and once on two. A digest covers what a file says, not
how it is packed: tensors, arrays, voxels and affine, numbers. Times, identities and speeds are left
out. `RENAMED` maps names of today to those under which the baseline knows the same content.
Floating-point results depend on the CPU and on torch, so a baseline names both.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import zarr
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "same_results.csv"
COLUMNS = ("commit", "cpu", "torch", "processes", "item", "sha256")
# (pattern of today, name in the baseline), tried on every part of an item's name and every key
RENAMED: tuple[tuple[str, str], ...] = (
    (r"^tune-label-embedding", "tune-labels"),
    (r"slice_protocol\.csv$", "legacy_slices.csv"),
    (r"^slice_protocol$", "legacy"),
    (r"^min_body_fraction$", "min_foreground_fraction"),
    (r"^(clean|pooled)_fraction$", r"\1_share"),
    (r"^max_timestep$", "max_noise_level"),
    (r"^gradient_accumulation_steps$", "accumulate"),
    (r"^keep_checkpoints$", "keep"),
    (r"^ema_decay$", "average_decay"),
    (r"^final_learning_rate_fraction$", "final_learning_rate"),
    (r"patch_logit_threshold$", "evidence_cut"),
    (r"patch_logits$", "evidence"),
    (r"thresholds$", "cuts"),
    (r"^threshold$", "cut"),
    (r"^heartbeat$", "beat"),
    (r"_wait_fraction$", "_wait_share"),
    (r":body_mask$", ":foreground"),
)
# parts of a run that say when, where and how fast, or that repeat others in words
VOLATILE_FILES = {"provenance.json", "run.json", "seconds.json", "state.json"}
VOLATILE_KEYS = re.compile(r"^(time|finished|sha256|crc32c|size|offset|length|speed/.*)$")


def main() -> int:
    options = _options()
    found: dict[tuple[str, str], str] = {}
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            run_debug(Path(folder), processes)
            contents = digests(Path(folder) / "debug")
        found |= {(str(processes), item): digest for item, digest in contents.items()}
    if options.write:
        write_baseline(options.write, found)
        print(f"{len(found)} digests written to {options.write}")
        return 0
    return report(options.against, found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", type=Path, help="record a baseline here, compare nothing")
    parser.add_argument("--against", type=Path, default=BASELINE, help="the baseline")
    return parser.parse_args()


def run_debug(runs: Path, processes: int) -> None:
    """Run the debug pipeline below `runs`; raises CalledProcessError where it fails."""
    start = [sys.executable, "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    if processes > 1:
        launcher = ("accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")
        start += [*launcher, "--num_processes", str(processes), "-m"]
        environment["ACCELERATE_USE_CPU"] = "true"
    words = ["cldf_dist", "run", "configs/debug.yaml", f"runs={runs}", "tracking.enabled=false"]
    subprocess.run(
        [*start, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )


def digests(run: Path) -> dict[str, str]:
    """The sha256 of each item of a run folder, by its name in the baseline."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.name in VOLATILE_FILES or not path.is_file():
            continue
        for part, content in _contents(path):
            name = "/".join(path.relative_to(run).parts) + part
            found[_first_name(name)] = hashlib.sha256(content).hexdigest()
    return found


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name of the part, canonical bytes) of all that one file holds; nothing for other files."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        yield "", b"".join(_array(n, tensors[n].float().numpy()) for n in sorted(tensors))
    elif path.name.endswith(".nii.gz"):
        image = nib.load(path)
        yield "", _array("voxels", np.asanyarray(image.dataobj)) + _array("affine", image.affine)
    elif path.suffix == ".npz":
        with np.load(path) as stored:
            yield from ((f":{name}", _array("", stored[name])) for name in sorted(stored))
    elif path.name == "zarr.json" and path.parent.suffix == ".zarr":
        group = zarr.open_group(path.parent, mode="r")
        arrays = sorted(name for name, _ in group.arrays() if name != "done")
        yield from ((f":{name}", _array("", group[name][:])) for name in arrays)
    elif path.suffix == ".tar":
        yield "", _tar(path)
    elif path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        yield "", json.dumps([[_first_name(cell) for cell in row] for row in rows]).encode()
    elif path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        yield "", json.dumps([_numbers(line) for line in lines]).encode()
    elif path.name == "DONE" or (path.suffix == ".json" and path.name != "zarr.json"):
        yield "", json.dumps(_numbers(json.loads(path.read_text()))).encode()


def _array(name: str, values: Any) -> bytes:
    array = np.ascontiguousarray(values)
    return f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes()


def _tar(path: Path) -> bytes:
    """Names and arrays of a shard's members; of their JSON the numbers."""
    content = b""
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            raw = stream.read() if stream else b""
            if member.name.endswith(".json"):
                raw = json.dumps(_numbers(json.loads(raw))).encode()
            content += member.name.encode() + raw
    return content


def _numbers(content: Any, path: str = "") -> list[tuple[str, float]]:
    """Every number and truth value of a JSON document with its path, sorted."""
    if isinstance(content, dict):
        kept = {k: v for k, v in content.items() if not VOLATILE_KEYS.match(k)}
        parts = [_numbers(v, f"{path}/{_first_name(k)}") for k, v in kept.items()]
    elif isinstance(content, list):
        parts = [_numbers(v, f"{path}/{i}") for i, v in enumerate(content)]
    else:
        return [(path, content)] if isinstance(content, (int, float)) else []
    return sorted(line for part in parts for line in part)


def _first_name(name: str) -> str:
    for today, first in RENAMED:
        name = re.sub(today, first, name)
    return name


def write_baseline(path: Path, found: dict[tuple[str, str], str]) -> None:
    """One row an item, with the commit, CPU and torch that made it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (processes, item), digest in sorted(found.items()):
            writer.writerow([commit, _cpu(), torch.__version__, processes, item, digest])


def report(path: Path, found: dict[tuple[str, str], str]) -> int:
    """Print what differs from a baseline; 0 where nothing does, else 1."""
    rows = [*csv.DictReader(path.read_text().splitlines())]
    made_on = f"{rows[0]['cpu']}, torch {rows[0]['torch']}"
    here = f"{_cpu()}, torch {torch.__version__}"
    if made_on != here:
        print(f"{path} was made on {made_on}; this is {here}: last bits may differ. Record a")
        print("baseline of the earlier commit on this machine with --write, compare --against it")
    counts = {processes for processes, _ in found}
    before = {
        (row["processes"], row["item"]): row["sha256"] for row in rows if row["processes"] in counts
    }
    changed = sorted(key for key in before if key in found and before[key] != found[key])
    for title, keys in (
        ("differs", changed),
        ("is missing", sorted(before.keys() - found.keys())),
        ("is new", sorted(found.keys() - before.keys())),
    ):
        for processes, item in keys:
            print(f"{title:<10} on {processes} process(es): {item}")
    same = len(before.keys() & found.keys()) - len(changed)
    print(f"{same} of {len(before)} items are the same as at {rows[0]['commit']}")
    return 0 if same == len(before) == len(found) else 1


def _cpu() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
