"""One process at a time in a stage's folder, and no trace of it after a crash.

`flock` is freed by the system when its owner dies. Some network file systems have none: there an
exclusive file stands in, refreshed as long as its owner lives.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

BEAT_SECONDS = 10.0
SHARED_SECONDS = 2.0
STALE_SECONDS = 120.0  # an exclusive file untouched for so long has lost its owner


class FolderLock:
    """Holds `folder` until `release`. RuntimeError, naming the owner, where somebody else does."""

    def __init__(
        self,
        folder: Path,
        *,
        remedy: str = "take another name=...",
        _with_others: bool = False,
        _first: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._remedy = folder, remedy
        self._file: IO[bytes] | None = None
        self._exclusive: Path | None = None
        self._stop = threading.Event()
        import fcntl

        file = (folder / ".lock").open("a+b", buffering=0)  # nothing is left to write at close
        try:
            if _with_others:
                _lock_together(file, _first)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(file)
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._in_use(owner) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            if _with_others:
                self._warn("nothing keeps two jobs from writing the same part")
                if _first is not None:
                    _first()
            else:
                self._take_exclusive_file()
            return
        self._file = file
        if _with_others:
            return
        with suppress(OSError):  # a full disk: the lock holds without its owner's name
            file.truncate(0)
            file.write(_me().encode())

    @classmethod
    def shared(cls, folder: Path, first: Callable[[], None] | None = None) -> FolderLock:
        """Hold `folder` together with others that ask for the same. Where nobody holds it `first`
        is called, before anybody else comes in. RuntimeError where somebody holds it alone."""
        return cls(folder, _with_others=True, _first=first)

    def release(self) -> None:
        self._stop.set()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._exclusive is not None:
            self._exclusive.unlink(missing_ok=True)
            self._exclusive = None

    def _take_exclusive_file(self) -> None:
        path = self._folder / ".lock.exclusive"
        self._warn(f"{path.name} stands in")
        if path.exists() and time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(_me())
        except FileExistsError as error:
            raise self._in_use(path.read_text()) from error
        self._exclusive = path
        threading.Thread(target=self._refresh, args=(path,), daemon=True).start()

    def _warn(self, consequence: str) -> None:
        print(
            f"warning: the file system of {self._folder} has no flock; {consequence}",
            file=sys.stderr,
        )

    def _refresh(self, path: Path) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(path)
            except OSError:  # a hiccup of the file system; the next beat tries again
                continue

    def _in_use(self, owner: str) -> RuntimeError:
        return RuntimeError(
            f"{self._folder} is in use by {owner.strip() or 'another process'}; wait for it, stop "
            f"it, or {self._remedy}"
        )


def _lock_together(file: IO[bytes], first: Callable[[], None] | None) -> None:
    """Take a lock that others may take too; the first of them calls `first` while it is alone."""
    import fcntl

    alone = False
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    if alone:
        if first is not None:
            first()
        fcntl.flock(file, fcntl.LOCK_SH)
        return
    patience = time.monotonic() + SHARED_SECONDS
    while True:  # another may be the first right now, and alone for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.05)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _owner(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
