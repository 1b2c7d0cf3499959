"""What must not lose a training: kills in the middle of a save, and a full disk."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TRAININGS = Path(__file__).parents[1] / "trainings"

# saves steps 1, 2, ... of known content, and says so after each
SAVER = """
    import sys
    from pathlib import Path
    import torch
    from cldf_dist.training.checkpoint import newest_checkpoint, save_checkpoint

    def content(step):
        return {name: {"w": torch.full((200_000,), step + number, dtype=torch.float32)}
                for number, name in enumerate(("task", "average", "optimizer"))}
"""
KILLER = """
    import os, random, signal, time

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(0)
    partial, most = 0, 2
    for attempt in range(kills):
        found = newest_checkpoint(folder, "run")
        step = found.state["step"] if found else 0
        if found:
            for name, group in content(step).items():
                assert torch.equal(found.tensors[name]["w"], group["w"]), (step, name)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                step += 1
                save_checkpoint(folder, "run", {"step": step}, content(step), keep_checkpoints=2)
                os.write(writer, step.to_bytes(4, "big"))
        os.close(writer)
        time.sleep(chance.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b""
        while block := os.read(reader, 4096):
            said += block
        os.close(reader)
        finished = int.from_bytes(said[-4:], "big") if said else step
        partial += bool(list(folder.glob(".*.partial")))
        now = newest_checkpoint(folder, "run")
        assert (now.state["step"] if now else 0) in (finished, finished + 1), (finished, now)
        # a save that has finished has taken old ones away; a kill may come just before that
        most = 3 if said else most + 1
        assert len(list(folder.glob("step-*"))) <= most, most
    print(newest_checkpoint(folder, "run").state["step"], partial)
"""


def python(
    environment: dict[str, str], code: str, *words: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVER) + textwrap.dedent(code), *words],
        env=environment,
        text=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_saves_the_newest_whole_checkpoint_remains(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Forty SIGKILLs at random moments of saving; never a loss of what was finished."""
    done = python(environment, KILLER, str(tmp_path), "40")
    assert done.returncode == 0, done.stderr[-3000:]
    steps, partial = map(int, done.stdout.split())
    assert steps > 5
    assert partial > 5, "the kills met saves that had begun"


def tmpfs_words() -> list[str]:
    """How a process gets a small file system of its own here; empty where it may not."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        try:
            trial = [*words, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
            if subprocess.run(trial, capture_output=True).returncode == 0:
                return words
        except FileNotFoundError:
            return []
    return []


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_with_room_the_training_goes_on(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """A tmpfs that takes one checkpoint but not two."""
    words = tmpfs_words()
    if not words:
        pytest.skip("no tmpfs can be mounted here: it takes root or user namespaces")
    disk = tmp_path / "disk"
    disk.mkdir()
    tiny = f"{sys.executable} {TRAININGS / 'tiny.py'} {disk} 'full checkpoint_every=1'"
    script = f"""
        mount -t tmpfs -o size=400k tmpfs {disk}
        {tiny} > {tmp_path}/first.txt 2>&1; echo $? > {tmp_path}/code
        ls -A {disk}/full/train-test/checkpoints > {tmp_path}/left.txt
        mount -o remount,size=20m {disk}
        {tiny} > {tmp_path}/second.txt 2>&1 && cp -r {disk}/full {tmp_path}/
    """
    done = subprocess.run(
        [*words, "sh", "-c", script], env=environment, text=True, capture_output=True
    )
    first = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "code").read_text().strip() == "1", first
    assert "No space left on device" in first
    assert "Traceback" not in first
    left = (tmp_path / "left.txt").read_text().split()
    assert left, "a whole checkpoint fitted"
    assert all(name.startswith("step-") for name in left), "nothing half written takes up room"
    assert done.returncode == 0, (tmp_path / "second.txt").read_text()
    assert f"resuming after step {len(left)}" in (tmp_path / "second.txt").read_text()
    assert (tmp_path / "full" / "train-test" / "DONE").exists()
