"""Atomically written files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class DamagedShardError(ValueError):
    """A file of prepared slices or of cached features is lost, cut or changed."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` atomically when the block ends without an exception.

    A reader sees the old file or the new one whole, after a crash too. If the block raises, `path`
    stays as it was and no temporary file is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers in `folder`; nobody may be writing there."""
    for partial in folder.rglob(".*.partial"):
        partial.unlink()
