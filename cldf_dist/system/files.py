"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends well.

    A reader sees the old file or the new one whole, after a crash too. Where the block raises,
    `path` stays as it was and nothing else is left.
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
    """Remove what writers left in `folder` when they were killed; nobody may write there now."""
    for partial in folder.rglob(".*.partial"):
        partial.unlink()
