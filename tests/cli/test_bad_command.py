"""Bad settings, folders, disks and times of starting get one clear line, and the same command works
once the cause is gone."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import CommandLine

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")
QUIET = "tracking.enabled=false"
PREPARE = ["prepare", DEBUG, QUIET, "data.phantom.num_patients=6"]
TRAIN = ["train-cam", *PREPARE[1:], "cam.fit.steps=3", "cam.fit.validate_every=0"]

Start = Callable[..., "subprocess.Popen[str]"]

# room for what opens a stage, not for its outputs: first on a disk that is all but full, then
# on one with room, at last on one that is read-only
SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from cldf_dist.__main__ import main

disk, *words = sys.argv[1:]
filler = Path(disk) / "filler"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
for stage in ("prepare", "train-cam"):
    free = os.statvfs(disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_bsize - 80_000))
    print("full", stage, main([stage, *words]), file=sys.stderr)
    assert not list(Path(disk).glob(f"debug/{stage}/**/*.partial*")), "half made"
    assert not (Path(disk) / "debug" / stage / "DONE").exists()
    filler.unlink()
    print("free", stage, main([stage, *words]), file=sys.stderr)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
print("read-only", "prepare", main(["prepare", *words, "name=other"]), file=sys.stderr)
"""


@pytest.fixture
def cldf(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    return CommandLine(tmp_path / "runs", capsys, monkeypatch)


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """While no file can grow beyond that: writing fails as on a full disk, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: {image_sise: 32}", ("unknown config key data.image_sise", "did you mean data.im")),
        ("dta: {image_size: 32}", ("unknown config key dta", "did you mean data?")),
        ("data: {image_size: big}", ("data.image_size must be int, got 'big'",)),
        ("data: 5", ("data must hold keys, got 5",)),
        ("cam: {channels: 16}", ("cam.channels must be a list of int, got 16",)),
        ("cam: {dropout: .nan}", ("cam.dropout must be a finite number, got nan",)),
        ("data: {image_size: 33}", ("data.image_size must be", "multiple of 2", "got 33")),
        ("data: {dataset: [phantom\n", ("my settings.yaml is not valid YAML", "line 1")),
        ("data:\n\timage_size: 32\n", ("my settings.yaml is not valid YAML", "line 2")),
        ("seed: 1\nseed: 2\n", ("my settings.yaml is not valid YAML", "duplicate key seed")),
        ("just words", ("unknown config key just words", "known: name, runs")),
        (None, ("no config file", "my settings.yaml", "configs/")),
    ],
)
def test_a_bad_config_file_is_told_by_key_or_line(
    content: str | None, said: tuple[str, ...], tmp_path: Path, cldf: CommandLine
) -> None:
    path = tmp_path / "my settings.yaml"
    if content is not None:
        path.write_text(content)
    words = ["prepare", DEBUG, str(path), QUIET, "name=x"]
    error = cldf.fails(*words)
    for part in said:
        assert part in error
    assert not cldf.runs.exists()
    path.write_text("data:\n  phantom: {num_patients: 4}\n")
    cldf.succeeds(*words)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.imagesize=32", "unknown config key data.imagesize; did you mean data.image_size?"),
        ("cam.fit.step=3", "unknown config key cam.fit.step; did you mean cam.fit.steps?"),
        ("image_size=32", "unknown config key image_size; known: name, runs, "),
        ("data.image_size=big", "data.image_size must be int, got 'big'"),
        ("data.image_size=", "data.image_size must be int, got None"),
        ("data.image_size=3.5", "data.image_size must be int, got 3.5"),
        ("data=5", "data must hold keys, got 5"),
        ("cam.channels=[16,a]", "cam.channels[1] must be int, got 'a'"),
        ("cam.fit.learning_rate=inf", "cam.fit.learning_rate must be a finite number, got inf"),
        ("data.clip_low=-.nan", "data.clip_low must be float, got '-.nan'"),
        ("tracking.enabled=maybe", "tracking.enabled must be bool, got 'maybe'"),
        ("name=a/../b", "name must be a plain folder name, got 'a/../b'"),
    ],
)
def test_a_bad_word_on_the_command_line_is_told_by_its_full_path(
    word: str, said: str, cldf: CommandLine
) -> None:
    assert said in cldf.fails(*PREPARE, word)
    assert not cldf.runs.exists()


def test_a_stage_before_its_inputs_names_the_command_that_makes_them(cldf: CommandLine) -> None:
    error = cldf.fails(*TRAIN)
    assert "debug/prepare is not finished; run: cldf prepare" in error
    cldf.succeeds(*PREPARE)
    cldf.succeeds(*TRAIN)


def test_a_run_of_other_settings_in_the_same_folder_is_refused(cldf: CommandLine) -> None:
    cldf.succeeds(*PREPARE)
    changed = [*PREPARE, "data.image_size=64"]
    code, said = cldf(*changed)
    assert code == 1
    error = said.splitlines()[-1]
    assert "debug/prepare was made with data.image_size=32, not 64; take another name=" in error
    cldf.succeeds(*changed, "name=other")
    cldf.succeeds(*PREPARE)


@pytest.mark.parametrize("name", ["run.json", "provenance.json", "config.yaml", "seconds.json"])
def test_a_damaged_file_of_a_run_is_named(name: str, cldf: CommandLine) -> None:
    folder = cldf.runs / "debug" / "prepare"
    words = [*PREPARE, "data.min_object_pixels=1000"]
    assert "the train split has 0 slices with" in cldf.fails(*words)
    (folder / name).write_text('{"data": ')
    error = cldf.fails(*words)
    assert f"debug/prepare/{name} is damaged" in error
    assert f"delete {folder} and run that stage again" in error
    shutil.rmtree(folder)
    cldf.succeeds(*PREPARE)


def test_runs_below_a_file_are_refused(tmp_path: Path, cldf: CommandLine) -> None:
    cldf.runs.write_text("a file")
    code, said = cldf(*PREPARE)
    assert code == 1
    assert f"cannot write the run folder {cldf.runs / 'debug' / 'prepare'}" in said
    assert said.splitlines()[-1].endswith("choose another with runs=FOLDER")
    cldf.runs.unlink()
    cldf.succeeds(*PREPARE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody else may")
def test_a_folder_of_runs_without_permission_is_refused(cldf: CommandLine) -> None:
    cldf.runs.mkdir(mode=0o500)
    assert "cannot write the run folder" in cldf.fails(*PREPARE)
    cldf.runs.chmod(0o700)
    cldf.succeeds(*PREPARE)


def test_a_file_beyond_the_limit_stops_a_stage_and_the_same_command_resumes(
    cldf: CommandLine,
) -> None:
    for words, limit in ((PREPARE, 30_000), (TRAIN, 60_000)):
        with files_up_to(limit):
            error = cldf.fails(*words)
        assert f"cannot write {cldf.runs / 'debug' / words[0]}" in error
        assert "would exceed the limit of the file system or of ulimit -f" in error
        assert "make room, then the same command resumes" in error
        cldf.succeeds(*words)
    log = cldf.runs / "debug" / "train-cam" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 3]


@pytest.mark.slow
def test_a_full_disk_stops_a_stage_and_the_same_command_resumes(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [*TRAIN[1:], f"runs={disk}"]
    process = subprocess.run(
        [*own_mounts(disk), sys.executable, "-c", SMALL_DISK, str(disk), *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = process.stderr
    assert process.returncode == 0, said
    assert "Traceback" not in said
    codes = [line.split() for line in said.splitlines() if line.endswith((" 0", " 1"))]
    assert codes == [
        ["full", "prepare", "1"],
        ["free", "prepare", "0"],
        ["full", "train-cam", "1"],
        ["free", "train-cam", "0"],
        ["read-only", "prepare", "1"],
    ]
    errors = [line for line in said.splitlines() if line.startswith("cldf: error: ")]
    assert len(errors) == 3
    for error, stage in zip(errors, ("prepare", "train-cam")):
        assert f"cannot write {disk / 'debug' / stage}" in error
        assert "the disk is full; make room, then the same command resumes" in error
    assert f"cannot write the run folder {disk / 'other' / 'prepare'}" in errors[2]
    assert "choose another with runs=FOLDER" in errors[2]


@pytest.mark.slow
def test_the_second_of_two_starts_says_who_is_at_work_and_the_first_finishes(
    cldf: CommandLine, start: Start, wait_until: Callable[..., None]
) -> None:
    words = [DEBUG, QUIET, "data.phantom.num_patients=150"]
    first = start("-m", "cldf_dist", "prepare", *words, f"runs={cldf.runs}")
    folder = cldf.runs / "debug" / "prepare"
    wait_until(lambda: any(folder.glob(".spool/*.npz")), first)
    first.send_signal(signal.SIGSTOP)
    code, said = cldf("prepare", *words)
    assert code == 1
    error = said.splitlines()[-1]
    assert error.startswith(f"cldf: error: {folder} is in use by process {first.pid} on ")
    assert error.endswith("wait for it, stop it, or take another name=...")
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate()
    assert first.returncode == 0, said
    assert "error" not in said
    assert "finished before" in cldf.succeeds("prepare", *words)


def own_mounts(folder: Path) -> list[str]:
    """The words that start a process which may mount a disk that nobody else sees."""
    for words in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*words, *mount], capture_output=True, check=False).returncode == 0:
                return words
    pytest.skip("no disk can be mounted here: unshare --mount is missing or not permitted")
