import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cldf_dist
from cldf_dist.__main__ import main
from cldf_dist.stages import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
DEBUG = str(CONFIGS / "debug.yaml")

Start = Callable[..., "subprocess.Popen[str]"]


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that fails says: exit code 1 and one line, no traceback."""
    assert main(list(words)) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("cldf: error: ")
    assert said.out == ""
    return lines[0]


def test_an_unknown_stage_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(capsys, "train-diffuse", DEBUG)
    assert "unknown stage 'train-diffuse'; stages, in order: prepare, train-diffusion, " in said
    assert said.endswith("evaluate, report; or run, for all of them")


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config file configs/nothing.yaml" in error_of(
        capsys, "prepare", "configs/nothing.yaml"
    )


def test_a_typo_in_a_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(capsys, "run", DEBUG, "cam.droput=0.3")
    assert said == "cldf: error: unknown config key cam.droput; did you mean cam.dropout?"


def test_a_bare_fit_word_is_for_one_training(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("run", "cache"):
        assert "say which training" in error_of(capsys, stage, DEBUG, "fit.steps=3")


def test_native_data_without_its_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "add data.root=FOLDER" in error_of(capsys, "prepare", "name=x")
    brats = str(CONFIGS / "brats.yaml")
    said = error_of(capsys, "prepare", brats, "data.root=/nowhere", "runs=/tmp/never", "--dry-run")
    assert "/nowhere" in said


def test_input_and_output_are_for_segment_and_belong_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "belong together" in error_of(capsys, "segment", DEBUG, "input=/data/scan")
    assert "for the segment stage, not for run" in error_of(
        capsys, "run", DEBUG, "input=/data/scan", "output=/tmp/masks"
    )


def test_a_folder_of_runs_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    runs = f"runs={tmp_path / 'file'}"
    assert main(["prepare", DEBUG, runs, "tracking.enabled=false"]) == 1
    assert "choose another with runs=FOLDER" in capsys.readouterr().err.splitlines()[-1]


def test_errors_can_be_had_with_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLDF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown stage"):
        main(["nothing", DEBUG])


@pytest.mark.parametrize("words", [[], ["prepare"]])
def test_too_few_words_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: cldf" in capsys.readouterr().err


def test_help_names_every_stage_and_imports_no_torch(start: Start) -> None:
    code = (
        "import sys\n"
        "from cldf_dist.__main__ import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'torch', 'accelerate', 'monai', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = start("-c", code)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    for stage in STAGES:
        assert re.search(rf"^  {stage.name} +\w", said, re.MULTILINE)


def test_the_module_tells_its_version(start: Start) -> None:
    process = start("-m", "cldf_dist", "--version")
    said, _ = process.communicate()
    assert (process.returncode, said) == (0, f"cldf {cldf_dist.__version__}\n")


def test_the_module_fails_with_code_one_and_one_line(start: Start) -> None:
    process = start("-m", "cldf_dist", "prepare", "no.yaml")
    said, errors = process.communicate()
    assert process.returncode == 1
    assert said == ""
    assert errors == "cldf: error: no config file no.yaml; the ready ones are in configs/\n"


@pytest.mark.slow
def test_ctrl_c_during_training_gives_130_and_can_be_resumed(
    debug_run: Any, tmp_path: Path, start: Start, wait_until: Callable[..., None]
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    words = ["fit.steps=100000", "fit.log_every=1", "fit.validate_every=0"]
    process = start("-m", "cldf_dist", "train-cam", *run.words, *words)
    stage = run.folder / "train-cam"
    log = stage / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "stopped by SIGINT after step" in errors
    assert "Traceback" not in errors
    assert not (stage / "DONE").exists()
    (found,) = re.findall(r"after step (\d+), all saved", errors)
    assert (stage / "checkpoints" / f"step-{int(found):08d}" / "manifest.json").exists()


def test_ctrl_c_outside_of_training_gives_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], interrupt_when: Callable[..., None]
) -> None:
    spool = tmp_path / "debug" / "prepare" / ".spool"
    interrupt_when(lambda: any(spool.glob("phantom_*.npz")))
    words = [DEBUG, f"runs={tmp_path}", "tracking.enabled=false", "data.phantom.num_patients=5000"]
    assert main(["prepare", *words]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "cldf: interrupted; the same command resumes"
    assert not (tmp_path / "debug" / "prepare" / "DONE").exists()
