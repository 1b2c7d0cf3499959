"""The checks of `cldf doctor` on the disks and on the tracking server."""

from __future__ import annotations

import os
import shutil
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from cldf_dist.config import Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.doctor.findings import Finding, error, ok, warning
from cldf_dist.inference.feature_extraction import cached_slices
from cldf_dist.stages.cache import bytes_to_come
from cldf_dist.system.distributed import broadcast_object, gather_objects, processes
from cldf_dist.system.locks import FolderLock

TEST_FILE_BYTES = 64 * 2**20
SMALL_FILES = 200
SLOW_DISK = 100e6  # bytes per second, written and synced
SLOW_FILES = 200.0  # small files per second
SEEN_SECONDS = 10.0  # a network file system may take so long to show a file elsewhere


def of_folder(config: Config) -> Iterator[Finding]:
    """The disk under `runs`, from every process: room, pace, locks, whether it is one folder."""
    folder = Path(config.runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pace, files = _pace(folder)
    except OSError as problem:
        said = f"cannot write {folder}: {problem.strerror}"
        yield error("disk", said, "choose another with runs=FOLDER")
        pace = files = 0.0
    paces = gather_objects((pace, files))
    if not all(written for written, _ in paces):
        return
    slowest, fewest = min(p for p, _ in paces), min(f for _, f in paces)
    free = shutil.disk_usage(folder).free / 1e9
    said = f"{folder}: {free:.1f} GB free, {slowest / 1e6:.0f} MB/s written and "
    said += f"{fewest:.0f} small files a second by each process"
    if slowest < SLOW_DISK or fewest < SLOW_FILES:
        yield warning("disk", f"{said}, which is slow", "put runs= on the scratch file system")
    else:
        yield ok("disk", said)
    yield from _one_folder(folder)
    if processes().is_main:
        yield from _lock(folder)


def _pace(folder: Path) -> tuple[float, float]:
    """Bytes per second of one large file, synced, and small files made and removed per second."""
    path = _test_file(folder)
    block = os.urandom(2**20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(TEST_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        pace = TEST_FILE_BYTES / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(SMALL_FILES):
            path.write_bytes(b"")
            path.unlink()
        return pace, SMALL_FILES / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _one_folder(folder: Path) -> Iterator[Finding]:
    """A finding: every process sees what the main one writes, or does not."""
    path = Path(broadcast_object(str(_test_file(folder))))
    if processes().is_main:
        path.write_text("here")
    broadcast_object(None)  # it is written
    sees = gather_objects(_appears(path))
    if processes().is_main:
        path.unlink(missing_ok=True)
    blind = [rank for rank, can_see in enumerate(sees) if not can_see]
    if blind:
        said = f"processes {blind} do not see what process 0 writes to {folder}"
        yield error("disk", said, "runs= must lie on a file system that all nodes share")


def _appears(path: Path) -> bool:
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _lock(folder: Path) -> Iterator[Finding]:
    path = _test_file(folder)
    path.mkdir()
    try:
        lock = FolderLock(path)
        stands_in = (path / ".lock.exclusive").exists()
        lock.release()
    except (OSError, RuntimeError) as problem:
        yield error("locks", f"{folder}: {problem}", "choose a file system with flock by runs=")
    else:
        yield ok("locks", "a lock file stands in for flock" if stands_in else "flock works")
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _test_file(folder: Path) -> Path:
    return folder / f".doctor-{uuid.uuid4().hex}"


def of_data(config: Config) -> Iterator[Finding]:
    """Shards against processes and workers; the cache against the disk."""
    folder = config.run_folder / "prepare"
    if not (folder / "manifest.json").exists():
        yield ok("data", "nothing is prepared yet; cldf prepare CONFIG")
        return
    try:
        shards = ShardSet(folder)
    except (ValueError, OSError) as problem:
        yield Finding("error", "data", str(problem))
        return
    table = shards.split("train")
    num_shards = len(set(table.shard_of.tolist()))
    readers = processes().world_size * max(config.diffusion.fit.num_workers, 1)
    said = f"{len(table)} training slices in {num_shards} shard(s), {readers} reader(s)"
    if num_shards < readers:
        remedy = "fewer fit.num_workers, or prepare again with a smaller data.slices_per_shard"
        yield warning("data", f"{said}, so that several read the same shard", remedy)
    else:
        yield ok("data", said)
    needed, free = bytes_to_come(config, cached_slices(shards)), shutil.disk_usage(folder).free
    said = f"features take {needed / 1e9:.2f} GB more, {free / 1e9:.1f} GB are free"
    if needed > free:
        remedy = (
            "features.storage=int8, features.combine_timesteps=average, fewer features.taps, or "
        )
        yield error("cache", said, remedy + "runs=FOLDER on another disk")
    else:
        yield ok("cache", said)


def of_tracking(config: Config) -> Iterator[Finding]:
    """Findings about the MLflow store: whether it is reached."""
    uri = config.tracking.uri
    if not config.tracking.enabled:
        yield ok("mlflow", "switched off; metrics.jsonl holds everything")
    elif not uri.startswith(("http://", "https://")):
        place = uri or f"a file in {config.runs}"
        yield ok("mlflow", f"{place}; SLURM jobs leave it to cldf sync-tracking")
    else:
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
                yield ok("mlflow", f"{uri} answers ({answer.status})")
        except (OSError, ValueError) as problem:
            remedy = "metrics.jsonl holds everything; cldf sync-tracking sends it later"
            yield warning("mlflow", f"{uri} does not answer ({problem})", remedy)
