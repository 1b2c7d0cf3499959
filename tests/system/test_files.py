"""Files that appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from cldf_dist.__main__ import main
from cldf_dist.system.files import atomic_write, remove_leftovers


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_when_the_stage_starts_again(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(
        tmp_path,
        *("prepare", "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam"),
        *("train-patch-classifier", "cache", "train-decoder", "segment"),
    )
    segment = run.folder / "segment"
    (segment / "DONE").unlink()
    left = [
        segment / "scores" / ".a.npz.7.partial",
        segment / "masks" / "cldf" / ".a.nii.gz.7.partial",
    ]
    for path in left:
        path.write_bytes(b"half")
    assert main(["segment", *run.words]) == 0
    assert not any(path.exists() for path in left)
    assert json.loads((segment / "DONE").read_text())["stage"] == "segment"
    remove_leftovers(segment)  # nothing to do is fine
