"""A lock on a folder that is released when its owner crashes.

The system frees `flock` when its owner dies. Some network file systems have none: there an
exclusive file replaces it, touched as long as its owner lives. We do not use `filelock`: it has no
shared flock, names no owner, and has a substitute for ENOSYS alone, without a heartbeat.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.05
HEARTBEAT_SECONDS = 10.0
SHARED_SECONDS = 2.0  # for the first of those who share a folder to let the others in
STALE_SECONDS = 120.0  # an exclusive file untouched for so long has lost its owner
HELD = (errno.EWOULDBLOCK, errno.EACCES)
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """An exclusive lock on `folder`, held until `release` or the end of its `with` block.

    Raises RuntimeError, naming the owner, where another process holds it after `wait_seconds`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        remedy: str = "take another name=...",
        wait_seconds: float = 0.0,
        _first: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._first = folder, _first
        self._stand_in = folder / ".lock.exclusive"
        self._heartbeat: threading.Thread | None = None
        self._released = threading.Event()
        self._file = (folder / ".lock").open("a+b", buffering=0)  # nothing is written at close
        deadline = time.monotonic() + wait_seconds
        try:
            while not self._try_flock():
                if time.monotonic() >= deadline:
                    raise RuntimeError(
                        f"{folder} is in use by {self._owner()}; wait for it, stop it, or {remedy}"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def shared(cls, folder: Path, first: Callable[[], None] = lambda: None) -> FolderLock:
        """A shared lock on `folder`.

        The first holder calls `first` before others can take the lock. Raises RuntimeError where
        another process holds the lock exclusively.
        """
        return cls(folder, wait_seconds=SHARED_SECONDS, _first=first)

    def release(self) -> None:
        """Release the lock."""
        self._released.set()
        self._file.close()
        if self._heartbeat is not None:
            self._heartbeat = None
            self._stand_in.unlink(missing_ok=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try_flock(self) -> bool:
        """True if this object holds the lock now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return self._try_without_flock()
            if error.errno not in HELD:
                raise
            return self._first is not None and self._try_to_share()
        if self._first is not None:
            self._first()
            return self._try_to_share()
        with suppress(OSError):  # a full disk: the lock holds without its owner's name
            self._file.truncate(0)
            self._file.write(_own_name())
        return True

    def _try_to_share(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _try_without_flock(self) -> bool:
        if self._first is not None:
            self._warn("nothing prevents two jobs from writing the same part")
            self._first()
            return True
        with suppress(FileNotFoundError):
            if time.time() - self._stand_in.stat().st_mtime > STALE_SECONDS:
                self._stand_in.unlink()
        try:
            with self._stand_in.open("xb") as file:
                file.write(_own_name())
        except FileExistsError:
            return False
        self._warn(f"{self._stand_in.name} stands in")
        self._heartbeat = threading.Thread(target=self._refresh, daemon=True)
        self._heartbeat.start()
        return True

    def _refresh(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a transient error of the file system; tried again next time
                os.utime(self._stand_in)

    def _warn(self, consequence: str) -> None:
        what = f"warning: the file system of {self._folder} has no flock"
        print(f"{what}; {consequence}", file=sys.stderr)

    def _owner(self) -> str:
        for path in (self._stand_in, self._folder / ".lock"):
            with suppress(OSError):
                if owner := path.read_text(errors="replace").strip():
                    return owner
        return "another process"


def _own_name() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}".encode()
