import io
import sys

import pytest

from cldf_dist.system import progress as module
from cldf_dist.system.progress import progress


def test_a_log_gets_one_plain_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3) as bar:
        for loss in (0.5, 0.25, 0.125):
            bar.advance(note=f"loss {loss}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: 3/3 steps, ")
    assert line.endswith("left loss 0.125")


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1.0)
    with progress("cache", 20, "slices") as bar:
        bar.advance(8)
        bar.advance(8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "cache: 8/20 slices", "cache: 16/20 slices", "cache: 16/20 slices",
    ]  # fmt: skip


def test_other_ranks_count_silently(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, shown=False) as bar:
        bar.advance()
        bar.advance(note="loss 1")
    assert bar.done == 2
    captured = capsys.readouterr()
    assert captured.err + captured.out == ""


def test_work_of_an_earlier_start_does_not_count_for_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with progress("train", 100) as bar:  # starts at 0 s
        bar.start_at(60)
        bar.advance(20)  # asks at 10 s
    # the line is made at 20 s: 20 steps in 20 s, and 20 steps left
    assert capsys.readouterr().err == "train: 80/100 steps, 1.0 steps/s, 0:00:20 left\n"


def test_nothing_done_yet_promises_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 5):
        pass
    assert "? left" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("train", 7) as bar:
        bar.start_at(3)
        bar.advance(4, note="loss 0.5")
    drawn = terminal.getvalue()
    assert "train" in drawn
    assert "7/7" in drawn
