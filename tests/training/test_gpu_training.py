"""The trainer on GPUs: `make test-gpu`. Nothing here runs on a CPU."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cldf_dist.config import Config, Data, Fit, Tracking, UNet
from cldf_dist.data.stream import Stream
from cldf_dist.method.noise import Schedule
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.tasks.denoise import Denoise
from cldf_dist.training.fit import fit

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "trainings" / "tiny.py")
NET = UNet(
    channels=(32, 64), num_res_blocks=1, attention_levels=(False, True), num_head_channels=32,
    norm_num_groups=8,
)  # fmt: skip
SETTINGS = Fit(
    steps=12, batch_size=8, learning_rate=1e-3, warmup_steps=2, checkpoint_every=6,
    keep_checkpoints=9,
    validate_every=6, validation_samples=8, log_every=3,
)  # fmt: skip

pytestmark = pytest.mark.gpu


class Squares:
    """Images with a bright square where the label is 1; none from sample number `end` on."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __len__(self) -> int:
        return 32

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        if sample_number >= self.end:
            raise RuntimeError("the power is gone")
        rng = np.random.default_rng([position, sample_number])
        image = rng.normal(scale=0.1, size=(2, 32, 32)).astype(np.float32)
        image[:, 8:16, 8:16] += position % 2
        return {
            "image": torch.from_numpy(image),
            "label": position % 2,
            "sample_number": sample_number,
        }


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def train(
    runs: Path, name: str, precision: str = "bf16", *, end: int = 1000, **changes: Any
) -> dict[str, Any]:
    """The last training line of metrics.jsonl."""
    config = Config(
        name=name, runs=str(runs), data=Data(dataset="phantom"), mixed_precision=precision,
        tracking=Tracking(enabled=False),
    )  # fmt: skip
    run = Run(config, "train-test", ("cam",))
    run.open()
    torch.manual_seed(0)
    task: nn.Module = Denoise(
        build_unet(NET, 2),
        Schedule(1000, "cosine", "v_prediction"),
        min_snr_gamma=5.0,
        label_dropout=0.1,
        seed=0,
        image_size=32,
    )
    stream = Stream(Squares(end), np.arange(32) // 8, seed=0)
    try:
        fit(task, stream, replace(SETTINGS, **changes), run, stream)
    finally:
        run.close()
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    training = [json.loads(line) for line in lines if "train/loss" in line]
    result: dict[str, Any] = training[-1]
    return result


def weights(runs: Path, name: str) -> dict[str, Tensor]:
    folder = runs / name / "train-test" / "checkpoints" / "step-00000012"
    return load_file(folder / "average.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_training_ends_as_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    whole = train(tmp_path, "whole", precision)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(tmp_path, "resumed", precision, end=8 * SETTINGS.batch_size)
    resumed = train(tmp_path, "resumed", precision)
    assert resumed["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-3)
    for key, value in weights(tmp_path, "whole").items():
        torch.testing.assert_close(weights(tmp_path, "resumed")[key], value, rtol=1e-3, atol=1e-4)
    assert whole["speed/memory_gb"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True},
        {"channels_last": "always"},
        {"gradient_accumulation_steps": 2},
        {"num_workers": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_makes_it_faster_or_smaller_trains_alike(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = train(tmp_path, "plain", "no")
    other = train(tmp_path, "other", "no", **changes)
    assert other["train/loss"] == pytest.approx(plain["train/loss"], rel=0.05)
    for key, value in weights(tmp_path, "plain").items():
        torch.testing.assert_close(weights(tmp_path, "other")[key], value, rtol=0.1, atol=5e-3)


@pytest.mark.parametrize(
    "file", ["one_gpu.yaml", "ddp.yaml", "multi_node.yaml", "zero1.yaml", "zero2.yaml"]
)
def test_the_gpu_files_train_stop_and_resume(tmp_path: Path, file: str) -> None:
    """Under accelerate's launcher on all GPUs of this machine (at most two)."""
    count = 1 if file == "one_gpu.yaml" else min(torch.cuda.device_count(), 2)
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / file)]
    words += ["--num_processes", str(count)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words += ["--main_process_port", str(free.getsockname()[1])]
    if file == "multi_node.yaml":
        words += ["--num_machines", "1", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
    same = 'precision="bf16"'
    scenarios = (f"whole {same}", f"stopped term=4 {same}", f"stopped {same}")
    given = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *given])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *words,
            TINY,
            str(tmp_path),
            *scenarios,
        ],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("finished") == 2 * count
    assert done.stdout.count("stopped by SIGTERM") == count
    for name in ("whole", "stopped"):
        folder = tmp_path / name / "train-test" / "checkpoints" / "step-00000009"
        found = load_file(folder / "average.safetensors")
        assert all(torch.isfinite(value).all() for value in found.values())
