from pathlib import Path
from typing import Any

import pytest

from cldf_dist.__main__ import main


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_xformers_on_a_cpu_is_refused_before_the_first_step(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    words = [*run.words, *options]
    assert main(["train-diffusion", *words, "diffusion.net.attention=xformers"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "cldf: error: attention=xformers needs a CUDA device, got cpu; set attention to sdpa "
        "(diffusion.net.attention=sdpa); the weights are the same"
    )
    folder = run.folder / "train-diffusion"
    assert not (folder / "checkpoints").exists()
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size


def test_auto_attention_and_gradient_checkpointing_train_to_the_same_net(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    settings = ["diffusion.net.attention=auto", "diffusion.net.gradient_checkpointing=true"]
    assert main(["train-diffusion", *run.words, *settings]) == 0
    said = capsys.readouterr().err.splitlines()
    choices = [line for line in said if "attention" in line]
    assert choices == [
        "diffusion.net.attention=auto is sdpa: xformers needs a CUDA device, got cpu"
    ]
    assert said.index(choices[0]) < next(i for i, line in enumerate(said) if "6 steps" in line)
    net = "train-diffusion/net.safetensors"
    assert (run.folder / net).read_bytes() == (debug_run.folder / net).read_bytes()


def test_previews_lie_in_their_folder(debug_run: Any) -> None:
    previews = debug_run.folder / "train-diffusion" / "previews"
    assert [path.name for path in previews.iterdir()] == ["samples-00000006.png"]
