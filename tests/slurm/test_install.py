"""slurm/install.sh, the image files that call it, and Python in a container."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"
DEBUG = str(ROOT / "configs" / "debug.yaml")

Environment = dict[str, str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def plain(environment: Environment, tmp_path: Path) -> Environment:
    """The environment of a user who has nothing of this checkout."""
    left_out = ("PYTHONPATH", "CLDF_CLUSTER_ENV", "CLDF_PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in environment.items() if name not in left_out}


@pytest.fixture
def run(plain: Environment, tmp_path: Path) -> Run:
    """Run words in a folder that is not the repository."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run_words(*words: object, **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            list(map(str, words)), env={**plain, **changes}, cwd=elsewhere,
            text=True, capture_output=True,
        )  # fmt: skip

    return run_words


def copy_of_the_repository(folder: Path) -> Path:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this is no clone: there is no list of its files")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that was removed and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def environment_with_all_that_is_needed(folder: Path, run: Run) -> None:
    """A new virtual environment that has the packages of this one, pip too, but not cldf_dist."""
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))


OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false"}  # false: pip's own oddity


def copied_by_docker() -> list[list[str]]:
    """Sources and target of every COPY."""
    text = (SLURM / "Dockerfile").read_text()
    return [line.split() for line in re.findall(r"^COPY (.+)", text, re.MULTILINE)]


def section(name: str) -> list[str]:
    """The lines of one section of the Apptainer definition."""
    text = (SLURM / "apptainer.def").read_text()
    return [line.strip() for line in text.split(f"%{name}\n")[1].split("\n\n")[0].splitlines()]


def test_both_images_have_the_same_base_and_files_and_only_call_the_script() -> None:
    docker = (SLURM / "Dockerfile").read_text()
    base = re.findall(r"^FROM (.+)", docker, re.MULTILINE)
    assert re.findall(r"^From: (.+)", (SLURM / "apptainer.def").read_text(), re.MULTILINE) == base
    copied = [source for *sources, _ in copied_by_docker() for source in sources]
    assert [line.split()[0] for line in section("files")] == copied
    for line in section("files"):
        source, target = line.split()
        assert target == "/opt/cldf/" + ("slurm/" if source.startswith("slurm/") else "")
    calls = re.findall(r"^RUN (.+)", docker, re.MULTILINE)
    assert calls == ["PIP_NO_CACHE_DIR=1 EDITABLE=no slurm/install.sh /opt/venv"]
    assert section("post") == [calls[0].replace("slurm/", "/opt/cldf/slurm/")]
    path = "PATH=/opt/venv/bin:$PATH"
    assert f"ENV {path}\n" in docker
    assert section("environment") == [f"export {path}"]


@pytest.mark.slow
def test_what_an_image_copies_is_enough_and_works_without_its_source(
    run: Run, tmp_path: Path
) -> None:
    """FOLDER counts from where the caller is. The second run repeats the first; then the source
    may go."""
    folder, source = tmp_path / "elsewhere" / "environment", tmp_path / "with blank"
    for *names, target in copied_by_docker():
        for name in names:
            place = source / target / name if target == "./" else source / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, place)
    environment_with_all_that_is_needed(folder, run)
    for _ in range(2):
        installed = run(source / "slurm" / "install.sh", folder.name, EDITABLE="no", **OFFLINE)
        assert installed.returncode == 0, installed.stderr
    assert f"work in {folder}" in installed.stdout
    shutil.rmtree(source)
    where = "import cldf_dist, cldf_kernels; print(cldf_dist.__file__, cldf_kernels.__file__)"
    found = run(folder / "bin" / "python", "-c", where).stdout.split()
    assert [Path(file).is_relative_to(folder) for file in found] == [True, True]
    dry = run(folder / "bin" / "cldf", "run", DEBUG, "--dry-run", f"runs={tmp_path}")
    assert dry.returncode == 0, dry.stderr
    assert "train-decoder" in dry.stdout


def test_a_python_that_is_too_old_is_named_with_the_remedy(run: Run, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"  # stands for a cluster's own: says its version, and no to ours
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi\n')
    old.chmod(0o755)
    done = run(SLURM / "install.sh", tmp_path / "new", PYTHON=str(old))
    assert done.returncode == 1
    assert f"3.11 or newer is needed; {old} is Python 3.9.2. Set PYTHON=" in done.stderr
    done = run(SLURM / "install.sh", tmp_path / "new", PYTHON="python3.no")
    assert done.returncode == 1
    assert "there is no python3.no" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "notes.txt").write_text("mine")
    done = run(SLURM / "install.sh", tmp_path / "study", PYTHON=sys.executable)
    assert done.returncode == 1
    assert "is no virtual environment; name another folder" in done.stderr
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["notes.txt"]
    assert run(SLURM / "install.sh", "--help").returncode == 2


@pytest.mark.slow
def test_only_an_environment_that_was_never_finished_is_made_anew(run: Run, tmp_path: Path) -> None:
    """Every run fails for want of packages."""
    folder = tmp_path / "new"
    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    left = folder / "left_by_a_run"
    for number in (1, 2):
        done = run(SLURM / "install.sh", folder, PYTHON=sys.executable, **nothing)
        assert done.returncode != 0
        assert ("an earlier run did not end" in done.stderr) == (number == 2), done.stderr
        assert not left.exists()
        left.touch()
    (folder / ".cldf-install-unfinished").unlink()  # as at the end of a run that succeeds
    assert run(SLURM / "install.sh", folder, PYTHON=sys.executable, **nothing).returncode != 0
    assert left.exists()


@dataclass(frozen=True)
class Container:
    """What stands for Apptainer: it notes its words and runs those behind the image, here."""

    folder: Path

    def __post_init__(self) -> None:
        self.image.write_text("")
        program = self.folder / "apptainer"
        program.write_text(
            "#!/usr/bin/env bash\n"
            f'echo "$*" >>{shlex.quote(str(self.folder / "words"))}\n'
            'while [[ $1 != *.sif ]]; do if [[ $1 == --env ]]; then export "$2"; fi; shift; done\n'
            f'shift 2; exec {shlex.quote(sys.executable)} "$@"\n'
        )
        program.chmod(0o755)

    @property
    def image(self) -> Path:
        return self.folder / "cldf.sif"

    @property
    def environment(self) -> Environment:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "CLDF_CONTAINER": str(self.image)}

    def words(self) -> list[str]:
        """The words of each call; without the option of machines that have GPUs."""
        lines = (self.folder / "words").read_text().splitlines()
        return [line.replace("exec --nv ", "exec ") for line in lines]


@pytest.fixture
def container(tmp_path: Path) -> Container:
    (tmp_path / "container").mkdir()
    return Container(tmp_path / "container")


def test_python_in_a_container_runs_the_code_of_the_repository(
    run: Run, container: Container
) -> None:
    code = "import cldf_dist, cldf_kernels; print(cldf_dist.__file__, cldf_kernels.__file__)"
    done = run(SLURM / "container-python", "-c", code, **container.environment)
    assert done.returncode == 0, done.stderr
    package, kernels = done.stdout.split()
    assert Path(package).parents[1] == ROOT
    assert Path(kernels).parents[2] == ROOT
    assert container.words() == [
        f"exec --bind {ROOT} --env PYTHONPATH={ROOT}:{ROOT}/kernels {container.image} "
        f"python -c {code}"
    ]


def test_python_in_a_container_gets_the_signals(plain: Environment, container: Container) -> None:
    """Also where they are ignored until it listens, as in a job."""
    code = (
        "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7)); "
        "print('ready', flush=True); signal.pause()"
    )
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "task"]
    process = subprocess.Popen(
        [*ignoring, str(SLURM / "container-python"), "-c", code],
        env={**plain, **container.environment}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 7
    finally:
        process.kill()
        process.communicate()


def test_a_container_that_cannot_start_is_explained(run: Run, container: Container) -> None:
    words = (SLURM / "container-python", "-c", "")
    without = {**container.environment, "CLDF_CONTAINER": ""}
    assert "in slurm/cluster.env: export CLDF_CONTAINER=" in run(*words, **without).stderr
    missing = {**container.environment, "CLDF_CONTAINER": "/nowhere/cldf.sif"}
    assert "CLDF_CONTAINER=/nowhere/cldf.sif is no file" in run(*words, **missing).stderr
    bare = container.folder / "bin"
    bare.mkdir()
    for name in ("bash", "dirname"):
        (bare / name).symlink_to(str(shutil.which(name)))
    done = run(*words, **{**container.environment, "PATH": str(bare)})
    assert done.returncode == 1
    assert "neither apptainer nor singularity here; load its module" in done.stderr


@pytest.mark.slurm
def test_a_job_runs_in_the_container_that_cluster_env_names(
    cluster: Cluster, debug_run: Any, container: Container, tmp_path: Path
) -> None:
    """The question of the batch script, the launcher and the program."""
    run = debug_run.copy_to(tmp_path)
    settings = tmp_path / "cluster.env"
    settings.write_text(
        f"CLDF_PYTHON=slurm/container-python\nexport CLDF_CONTAINER={container.image}\n"
        "export ACCELERATE_CONFIG=configs/accelerate/cpu.yaml\n"
    )
    job = cluster.submit(
        "--nodes=2", "slurm/stage.sbatch", "prepare", *run.words,
        CLDF_CLUSTER_ENV=str(settings), PATH=container.environment["PATH"],
    )  # fmt: skip
    assert cluster.ended(job)["JobState"] == "COMPLETED", cluster.log(job)
    calls = [line.split("python -m ")[1].split()[0] for line in container.words()]
    assert calls == [
        "cldf_dist.cli.slurm",
        "accelerate.commands.launch",
        "accelerate.commands.launch",
    ]


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_the_five_commands_of_the_readme_lead_from_a_clone_to_the_first_job(
    cluster: Cluster, plain: Environment, tmp_path: Path
) -> None:
    """With a real installation, for which pip needs its index."""
    section = (ROOT / "README.md").read_text().split("## On your cluster")[1]
    block = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0]
    clone, install, copy, doctor, pipeline = block.splitlines()
    upstream = copy_of_the_repository(tmp_path / "upstream")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "As it is"]):
        subprocess.run(["git", *words], cwd=upstream, check=True)
    user = {**plain, "SLURM_CONF": cluster.environment["SLURM_CONF"], "PIP_NO_COMPILE": "1"}

    def typed(*lines: str, folder: Path) -> str:
        done = subprocess.run(
            ["bash", "-euc", "\n".join(lines)], cwd=folder, env=user, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    typed(clone.replace("URL", "upstream"), install, copy, folder=tmp_path)
    here = tmp_path / "cldf_dist"
    settings = here / "slurm" / "cluster.env"
    edited = re.sub(r'^(CLDF_SBATCH\w*)=".*"', r'\1="--nodes=1"', settings.read_text(), flags=re.M)
    settings.write_text(edited)  # what two nodes of this machine have
    first = typed(doctor, folder=here).split()[-1]
    jobs = [line.split()[2] for line in typed(pipeline, folder=here).splitlines()[1:]]
    try:
        for job in (first, jobs[0]):
            state = cluster.ended(job)["JobState"]
            assert state == "COMPLETED", [p.read_text()[-3000:] for p in here.glob("slurm-*.log")]
    finally:
        cluster.run("scancel", *jobs)
        shutil.rmtree(here / ".venv", ignore_errors=True)  # gigabytes, which pytest would keep
    made = json.loads((here / "runs" / "debug" / "prepare" / "provenance.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    assert head.stdout.strip() in json.dumps(made)
    assert (here / "runs" / "debug" / "prepare" / "DONE").is_file()
