"""Promises of the lock on a folder, also where the file system has no flock."""

import errno
import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cldf_dist.system.locks import STALE_SECONDS, FolderLock


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_an_exclusive_file_keeps_others_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = FolderLock(tmp_path)
    assert "has no flock" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path)
    first.release()
    FolderLock(tmp_path).release()
    assert not (tmp_path / ".lock.exclusive").exists()


@pytest.mark.usefixtures("no_flock")
def test_an_exclusive_file_without_a_living_owner_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".lock.exclusive"
    path.write_text("process 1 on a node that died")
    old = path.stat().st_mtime - 2 * STALE_SECONDS
    os.utime(path, (old, old))
    lock = FolderLock(tmp_path)
    assert str(os.getpid()) in path.read_text()
    lock.release()


def test_a_second_lock_is_refused_and_a_released_one_is_free(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    with pytest.raises(RuntimeError, match="wait for it, stop it, or take another name"):
        FolderLock(tmp_path)
    first.release()
    FolderLock(tmp_path).release()


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        FolderLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".lock").read_text().startswith(f"process {child} on ")
    FolderLock(tmp_path).release()


def test_a_lock_that_may_wait_is_taken_when_it_is_released(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    with pytest.raises(RuntimeError, match="in use by process"):
        FolderLock(tmp_path, wait_seconds=0.1)
    threading.Timer(0.2, first.release).start()
    with FolderLock(tmp_path, wait_seconds=60):
        pass
    FolderLock(tmp_path).release()


def test_those_who_share_a_folder_come_in_one_by_one(tmp_path: Path) -> None:
    """Thirty processes at the same instant: each finds what the first has written."""
    gate = tmp_path / "gate"

    def enter() -> int:
        while not gate.exists():
            time.sleep(0.001)
        lock = FolderLock.shared(tmp_path, lambda: (tmp_path / "first").write_text("here") and None)
        seen = (tmp_path / "first").read_text() == "here"
        time.sleep(0.2)
        lock.release()
        return 0 if seen else 1

    children = []
    for _ in range(30):
        child = os.fork()
        if not child:
            code = 9
            try:
                code = enter()
            finally:
                os._exit(code)
        children.append(child)
    gate.touch()
    assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} == {0}


def test_a_shared_folder_is_closed_to_who_wants_it_alone(tmp_path: Path) -> None:
    shared = [FolderLock.shared(tmp_path) for _ in range(2)]
    with pytest.raises(RuntimeError, match="is in use by"):
        FolderLock(tmp_path)
    for lock in shared:
        lock.release()
    alone = FolderLock(tmp_path)
    with pytest.raises(RuntimeError, match=f"is in use by process {os.getpid()}"):
        FolderLock.shared(tmp_path)
    alone.release()
