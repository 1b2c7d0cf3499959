"""Promises of the lock on a stage's folder where the file system has no flock."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from cldf_dist.locks import STALE_SECONDS, FolderLock


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
