"""The documentation names what is there: files, commands, settings, links."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from cldf_dist.__main__ import DOCTOR, STUDY, SYNC
from cldf_dist.config import Config, flatten, load
from cldf_dist.stages import STAGES, stage_named
from cldf_dist.study.plan import planned_runs, read_study

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "slurm/*.md", "kernels/*.md")
    for path in ROOT.glob(pattern)
)
WITH_COMMANDS = [path for path in PAGES if path.parent != ROOT / "kernels"]
SECTIONS = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)]
FILE_ENDINGS = (".csv", ".html", ".json", ".jsonl", ".py", ".txt", ".yaml", ".zarr")
HARDWARE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a page that are marked as `language`; "" are those without a mark."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for marked, body in blocks if marked == language]


def code_spans(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Every line of the shell blocks, and every code span that could be one, as words."""
    for block in fenced(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)
    for span in code_spans(page):
        if span.split()[0] in ("cldf", "accelerate", "make", "sbatch", "slurm/pipeline.sh"):
            yield shlex.split(span)


def program_calls(page: Path) -> Iterator[list[str]]:
    """What follows `cldf`, however it is started; without what only stands for something else."""
    for words in command_lines(page):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[:1] == ["cldf"]:
            call = words[1:]
        elif words[:2] == ["accelerate", "launch"] and "cldf_dist" in words:
            call = words[words.index("cldf_dist") + 1 :]
        elif words[:1] == ["sbatch"] and "slurm/stage.sbatch" in words:
            call = words[words.index("slurm/stage.sbatch") + 1 :]
        elif words[:1] == ["slurm/pipeline.sh"]:
            call = ["run", *words[1:]]
        else:
            continue
        if call and call[0] not in ("STAGE", "..."):
            yield call


def launches() -> list[list[str]]:
    return [
        words[words.index("launch") + 1 :]
        for page in WITH_COMMANDS
        for words in command_lines(page)
        if "accelerate" in words and "launch" in words and "-m" in words
    ]


CALLS = [(page, call) for page in WITH_COMMANDS for call in program_calls(page)]


def test_the_pages_hold_commands_to_check() -> None:
    assert {"cluster.md", "data.md"} <= {page.name for page, _ in CALLS}
    assert launches()


@pytest.mark.parametrize(
    ("page", "call"), CALLS, ids=[f"{page.name}: {' '.join(call)}" for page, call in CALLS]
)
def test_commands_name_stages_files_and_settings_that_exist(page: Path, call: list[str]) -> None:
    name, *words = call
    if name == STUDY:
        check_study_command(words)
        return
    fit_section = "" if name in ("run", DOCTOR, SYNC) else stage_named(name).fit_section
    words = [word.replace("cache.part=task/", "cache.part=1/") for word in words]  # stage.sbatch's
    options = [word for word in words if word.startswith("--")]
    if name == SYNC:
        words = [word for word in words if not word.startswith("to=")]
    settings = [word for word in words if "=" in word]
    files = [word for word in words if word not in options and word not in settings]
    assert set(options) <= {"--dry-run"}
    if any(not word.isupper() and word != "..." for word in files):  # CONFIG stands for any
        load([str(ROOT / word) for word in files], settings, fit_section=fit_section)


def check_study_command(words: list[str]) -> None:
    options = [word for word in words if word.startswith("--")]
    assert set(options) <= {"--dry-run", "--tables-only"}
    for file in (word for word in words if "=" not in word and word not in options):
        if file.isupper():  # STUDY stands for any
            continue
        study, settings = read_study(str(ROOT / file), [word for word in words if "=" in word])
        assert planned_runs(study, (ROOT / file).parent, settings)


def test_launch_lines_are_what_accelerate_takes() -> None:
    from accelerate.commands.launch import launch_command_parser

    for words in launches():
        arguments = launch_command_parser().parse_args([w for w in words if w != "..."])
        assert (ROOT / arguments.config_file).is_file(), arguments.config_file
        assert arguments.module
        assert arguments.training_script == "cldf_dist"


def test_make_lines_name_targets_that_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [
        word
        for page in WITH_COMMANDS
        for words in command_lines(page)
        if words[:1] == ["make"]
        for word in words[1:]
        if "=" not in word
    ]
    assert "test" in named
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_the_text_exist(page: Path) -> None:
    known = flatten(Config())
    renamed = names_of_earlier_days() if page.name == "log.md" else set()
    for span in code_spans(page):
        path = span.split("=")[0]
        if path in renamed or path.rpartition(".")[2] in renamed:
            continue
        is_setting = re.fullmatch(rf"({'|'.join(SECTIONS)})\.[a-z0-9_.]+", path)
        if is_setting and not path.endswith(FILE_ENDINGS):
            assert path in known or any(key.startswith(f"{path}.") for key in known), span


def names_of_earlier_days() -> set[str]:
    """The columns "then" of the table in log.md: entries below it keep the names of their day."""
    table = (
        (ROOT / "docs" / "log.md")
        .read_text()
        .split("| then | now | | then | now |")[1]
        .split("\n\n")[0]
    )
    cells = [line.split("|") for line in table.splitlines()[2:]]
    return {
        name for line in cells for then in (1, 4) for name in re.findall(r"`(.+?)`", line[then])
    }


def test_constants_in_the_table_are_the_defaults() -> None:
    known = flatten(Config())
    rows = constants_under("## Constants")
    assert len(rows) > 20
    for keys, written in rows:
        first, *others = re.findall(r"`([^`]+)`", keys)
        prefix = first.rsplit(".", 1)[0]
        paths = [first, *(f"{prefix}{key}" if key.startswith(".") else key for key in others)]
        values = [known[path] for path in paths]
        between = "; " if len(values) > 1 and any(isinstance(v, tuple) for v in values) else ", "
        assert written == between.join(as_written(value) for value in values), keys


def test_constants_that_are_fixed_in_code_are_as_written() -> None:
    rows = constants_under("### Fixed in code")
    assert len(rows) > 5
    for names, written in rows:
        values = []
        for module, name in re.findall(r"`(\w+)\.(\w+)`", names):
            (path,) = (ROOT / "cldf_dist").rglob(f"{module}.py")
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            values.append(getattr(import_module(dotted), name))
        assert [float(word) for word in written.split(", ")] == values, names


def constants_under(heading: str) -> list[tuple[str, str]]:
    """The names and values in the table below a heading of method.md."""
    text = (ROOT / "docs" / "method.md").read_text().split(f"{heading}\n")[1]
    return re.findall(r"^\| (`.+?) \| (.*?) \|", re.split(r"\n##+ ", text)[0], re.MULTILINE)


def as_written(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_cluster_page_knows_which_stages_work_on_one_process() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    table = page.split("## What is distributed")[1].split("\n\n")[1]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    rows = [set(re.findall(r"`([^`]+)`", cell)) for cell in cells]
    assert rows[0] == {stage.name for stage in STAGES if not stage.distributed}
    assert set().union(*rows) == {stage.name for stage in STAGES}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def paths_of_the_readme_tree() -> set[Path]:
    """Every path that the tree of README.md names."""
    readme = ROOT / "README.md"
    trees = [block for block in fenced(readme, "") if (ROOT / (block.split() or ["?"])[0]).is_dir()]
    assert trees, "README.md shows the tree in a fenced block"
    found = set()
    for tree in trees:
        parents: list[tuple[int, Path]] = [(-1, ROOT)]
        for line in filter(str.strip, tree.splitlines()):
            depth = len(line) - len(line.lstrip())
            parents = [entry for entry in parents if entry[0] < depth]
            path = parents[-1][1] / line.split()[0]
            found.add(path)
            parents.append((depth, path))
    return found


def test_every_path_of_the_readme_tree_exists() -> None:
    assert not [path for path in paths_of_the_readme_tree() if not path.exists()]


def test_the_readme_tree_names_every_folder_and_every_module_of_the_root() -> None:
    """Folders within tests/ and of results are left out."""
    code = {
        folder
        for top in ("cldf_dist", "kernels")
        for folder in [ROOT / top, *{path.parent for path in (ROOT / top).rglob("*.py")}]
    }
    tops = {ROOT / name for name in ("configs", "slurm", "benchmarks", "tests", "docs")}
    assert not {*code, *tops, *(ROOT / "cldf_dist").glob("*.py")} - paths_of_the_readme_tree()


def test_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name != "study.yaml"]


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_config_loads(config: Path) -> None:
    is_size = config.name == "small.yaml"  # laid over an experiment
    files = [str(ROOT / "configs" / "brats.yaml"), str(config)] if is_size else [str(config)]
    assert load(files, ["data.root=somewhere"]).name == "-".join(Path(f).stem for f in files)


@pytest.mark.parametrize("hardware", HARDWARE, ids=name_of)
def test_accelerate_accepts_every_hardware_file(hardware: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(hardware)).num_processes >= 1  # unknown keys raise


@pytest.mark.parametrize(
    "script",
    ["slurm/stage.sbatch", "slurm/pipeline.sh", "slurm/cluster.env.example", ".ci/run"],
)
def test_shell_scripts_parse(script: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    subprocess.run([bash, "-n", str(ROOT / script)], check=True)


def test_slurm_dry_run_shows_every_stage_behind_those_it_needs(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    debug = str(ROOT / "configs" / "debug.yaml")
    (tmp_path / "debug" / "prepare").mkdir(parents=True)
    (tmp_path / "debug" / "prepare" / "DONE").touch()
    environment = {
        **os.environ,
        "CLDF_PYTHON": sys.executable,
        "CLDF_CLUSTER_ENV": str(ROOT / "slurm" / "cluster.env.example"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pipeline.sh"), "--dry-run", debug, f"runs={tmp_path}"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:]}
    assert list(rows) == [stage.name for stage in STAGES]
    assert rows["prepare"][1] == "finished"
    assert rows["train-cam"][-1] == "-"  # all it needs is there
    trainings = ("tune-label-embedding", "train-classifier", "train-cam", "train-patch-classifier")
    assert rows["cache"][-1] == ":".join(("afterok", *trainings))
    assert "--gpus-per-node=4" in rows["cache"]
    assert "--gpus-per-node=4" not in rows["report"]
