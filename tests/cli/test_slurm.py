"""What the batch scripts ask, without SLURM."""

from pathlib import Path

import pytest

from cldf_dist.cli.slurm import main
from cldf_dist.stages import STAGES

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")


def finish(runs: Path, *names: str) -> None:
    for name in names:
        (runs / name).mkdir(parents=True)
        (runs / name / "DONE").touch()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_a_stage_of_several_objects_is_finished_when_all_of_them_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("tumour_core", "whole_tumour")
    data = ["data.dataset=brats", "data.root=x", f"data.object={','.join(names)}"]
    words = [DEBUG, f"runs={tmp_path}", "name=study", *data]
    files = said(capsys, "done", "prepare", *words)
    assert files == [f"{tmp_path}/study/{name}/prepare/DONE" for name in names]
    finish(tmp_path / "study", "tumour_core/prepare")
    assert said(capsys, "chain", "1", *words)[0].startswith("prepare to-do")
    finish(tmp_path / "study", "whole_tumour/prepare")
    assert said(capsys, "chain", "1", *words)[0].startswith("prepare finished")


def test_only_the_missing_parts_of_the_cache_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path / "debug" / "cache" / "parts", "2-of-3")
    lines = said(capsys, "chain", "3", DEBUG, f"runs={tmp_path}")
    assert [line.split()[0] for line in lines] == [stage.name for stage in STAGES]
    (cache,) = (line for line in lines if line.startswith("cache"))
    assert cache.split()[3] == "1,3"


def test_what_only_the_exit_code_tells_has_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = [DEBUG, f"runs={tmp_path}", f"input={tmp_path}", f"output={tmp_path}/masks"]
    assert said(capsys, "done", "segment", *new) == [""]
    assert said(capsys, "done", "doctor") == [""]


def test_a_wrong_question_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["done", "prepar", DEBUG]) == 1
    assert capsys.readouterr().err.startswith("cldf: error: unknown stage 'prepar'")
