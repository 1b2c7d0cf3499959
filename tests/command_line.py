"""The command line as a user sees it: words in, exit code and messages out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cldf_dist.__main__ import main


@dataclass(frozen=True)
class CommandLine:
    """The command line, as seen by the user of one folder of runs."""

    runs: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *words: str) -> tuple[int, str]:
        """The exit code and what was said on stderr."""
        words = (*words, f"runs={self.runs}")
        self.monkeypatch.setattr("sys.argv", ["cldf", *words])
        self.capsys.readouterr()
        return main(words), self.capsys.readouterr().err

    def fails(self, *words: str) -> str:
        """The one line of the error; nothing is left that could be taken for finished."""
        code, said = self(*words)
        errors = [line for line in said.splitlines() if line.startswith("cldf: error: ")]
        assert code == 1, said
        assert said.splitlines()[-1:] == errors, said
        assert "Traceback" not in said
        half_made = ("DONE", "manifest.json", "*.partial*", "*.tar.partial")
        stage = "*" if words[0] == "run" else words[0]
        left = [path for name in half_made for path in self.runs.glob(f"*/{stage}/**/{name}")]
        assert not left
        return errors[0]

    def succeeds(self, *words: str) -> str:
        code, said = self(*words)
        assert code == 0, said
        assert "cldf: error" not in said
        return said
