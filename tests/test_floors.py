"""Imports point down the floors of the design, read from the source: nothing is imported here."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a module or package -> its floor, from the table in CONTRIBUTING.md
FLOORS = {
    place.removeprefix("kernels/").removesuffix(".py").strip("/").replace("/", "."): int(floor)
    for floor, places in re.findall(
        r"^\| (\d+) \| ([^|]*) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    for place in re.findall(r"`([^`]+)`", places)
} | {"cldf_dist": 8}  # the package's door, which no module goes through
SIBLINGS = ("cldf_dist.data", "cldf_dist.nets", "cldf_dist.method")
FORBIDDEN = {
    "cldf_dist.training": ("cldf_dist.tasks",),
    "cldf_dist.tasks": ("cldf_dist.training", "cldf_dist.runs"),
}
FOLDERS = {"cldf_dist": ROOT / "cldf_dist", "cldf_kernels": ROOT / "kernels" / "cldf_kernels"}
MODULES = {
    ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for name, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
}


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Full names of all that a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The longest entry of FLOORS that holds the name; None for other packages."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in FLOORS:
            return ".".join(parts[:length])
    return None


def offences(module: str, names: Iterator[str]) -> list[str]:
    mine = room(module)
    assert mine is not None
    found = []
    for name in names:
        theirs = room(name)
        if theirs is None or theirs == mine:
            continue
        if FLOORS[theirs] > FLOORS[mine]:
            found.append(f"{module} (floor {FLOORS[mine]}) imports {name} (floor {FLOORS[theirs]})")
        if mine in SIBLINGS and theirs in SIBLINGS:
            found.append(f"{module} imports its sibling {name}")
        if theirs in FORBIDDEN.get(mine, ()):
            found.append(f"{module} must not know {name}")
    return found


def test_every_module_has_a_floor() -> None:
    assert len(MODULES) > 40
    homeless = [
        name for name in MODULES if name != "cldf_dist" and room(name) in (None, "cldf_dist")
    ]
    assert not homeless, "say in CONTRIBUTING.md's table where they belong"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    assert offences(module, imported(MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cldf_dist.config", "from cldf_dist.data import slices"),
        ("cldf_dist.data.stream", "from cldf_dist.method.noise import Schedule"),
        ("cldf_dist.method.noise", "def late():\n    import cldf_dist.nets.unet"),
        ("cldf_dist.training.fit", "from cldf_dist.tasks.denoise import Denoise"),
        ("cldf_dist.runs.run", "from cldf_dist.stages import STAGES"),
        ("cldf_dist.stages.cache", "from cldf_dist.cli import pipeline"),
        ("cldf_kernels.supcon", "import cldf_dist.data"),
        ("cldf_dist.cli.new_scans", "from cldf_dist import __version__"),
    ],
)
def test_an_import_upwards_is_found(module: str, line: str) -> None:
    assert offences(module, imported(MODULES[module], line))


def arrows() -> Iterator[tuple[str, str]]:
    """(module, module that it imports), within this repository."""
    for module, path in MODULES.items():
        for name in imported(path):
            target = name if name in MODULES else name.rpartition(".")[0]
            if target in MODULES and target not in ("cldf_dist", module):
                yield module, target


@pytest.mark.parametrize("level", ["modules", "places of the table"])
def test_no_import_runs_in_a_circle(level: str) -> None:
    """A package's door, which hands on what its modules define, is no stop on the way."""
    graph: dict[str, set[str]] = {}
    for module, target in arrows():
        if level != "modules":
            module, target = room(module) or "", room(target) or ""
        if module != target and MODULES.get(module, Path()).name != "__init__.py":
            graph.setdefault(module, set()).add(target)
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_root_of_the_package_holds_few_modules() -> None:
    found = {path.stem for path in (ROOT / "cldf_dist").glob("*.py")}
    assert found == {"__init__", "__main__", "methods", "labels"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_stay_small(module: str) -> None:
    """330 lines a file, 60 a function; in the kernels 120."""
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 330
    longest = 120 if module.startswith("cldf_kernels") else 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < longest, node.name


def test_the_kernels_need_torch_triton_and_jaxtyping_alone() -> None:
    allowed = {"torch", "triton", "jaxtyping", "cldf_kernels", *sys.stdlib_module_names}
    for module, path in MODULES.items():
        if module.startswith("cldf_kernels"):
            assert {name.split(".")[0] for name in imported(path)} <= allowed, module


@pytest.mark.parametrize(
    "module",
    [
        *(name for name in MODULES if name.startswith("cldf_dist.config")),
        *("cldf_dist.system.seeding", "cldf_dist.runs.run", "cldf_dist.stages"),
    ],
)
def test_what_the_command_line_loads_first_imports_no_torch(module: str) -> None:
    """At the top of the file; processes and progress import torch and rich only when they work."""
    tree = ast.parse(MODULES[module].read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for node in top for name in imported(Path(), ast.unparse(node))}
    assert names <= {"cldf_dist", "annotated_types", *sys.stdlib_module_names}


def test_nothing_is_called_common() -> None:
    for module in MODULES:
        assert not {"utils", "common", "base", "misc", "helpers"} & set(module.split(".")), module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_docstrings_say_what_is_returned(module: str) -> None:
    """None begins with a question word."""
    words = ("What ", "Who ", "Whose ", "Where ", "How ", "Which ", "Whether ")
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert not (ast.get_docstring(node) or "").startswith(words), ast.get_docstring(node)
