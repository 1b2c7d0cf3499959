"""The files of the benchmarks, imported and run as the scripts are, in this process."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
Module = Callable[[str], ModuleType]
Command = Callable[..., None]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Import a file of the benchmarks by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def command(module: Module, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line of a benchmark."""

    def run(script: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        module(script).main()

    return run
