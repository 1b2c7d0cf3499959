"""A tiny training for tests that start it in processes of its own, and what can go wrong in it.

    python tests/trainings/tiny.py RUNS "NAME key=value ..." ["NAME key=value ..." ...]

Each argument is one start of the training NAME, one after the other in the same processes. Keys
are those of `Fit`, and these, which happen to the rank `victim` (default 0): `kill=STEP` (SIGKILL),
`term=STEP`, `usr1=STEP`, `int=STEP` (signals), `hang=STEP`, `file_limit=BYTES` (no larger file can
be written). `bad=NUMBER` makes that sample not a number, on whichever rank; `frozen=1` freezes the
first layer; `tracked=1` mirrors to MLflow.
"""

import json
import os
import resource
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cldf_dist.config import Config, Data, Fit, Tracking
from cldf_dist.data.stream import Stream
from cldf_dist.runs.run import Run
from cldf_dist.system.distributed import processes, wait_for_everyone
from cldf_dist.system.signals import Stopped
from cldf_dist.training.fit import fit

SETTINGS = Fit(
    steps=9, batch_size=12, gradient_accumulation_steps=2, learning_rate=0.05, warmup_steps=2,
    weight_decay=0.01,
    ema_decay=0.9, checkpoint_every=3, keep_checkpoints=20, validate_every=4, validation_samples=6,
    log_every=2,
)  # fmt: skip
NUM_ITEMS = 40
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}
Numbers = dict[str, Any]


class Blobs:
    """Small random images; a bright one has label 1. Every sample that is read is written down."""

    def __init__(self, bad: int, log: Path) -> None:
        self.bad, self.log = bad, log

    def __len__(self) -> int:
        return NUM_ITEMS

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        rng = np.random.default_rng([position, sample_number])
        label = position % 2
        image = rng.normal(size=(1, 6, 6)).astype(np.float32) + label
        if sample_number == self.bad:
            image[0, 0, 0] = np.nan
        with self.log.open("a") as file:
            file.write(f"{sample_number} {position}\n")
        return {"image": torch.from_numpy(image), "label": label, "sample_number": sample_number}


class Brightness(nn.Module):
    """A convolutional net with dropout and batch norm that tells bright from dark."""

    def __init__(self, faults: Numbers) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            # before batch norm a bias has no gradient but round-off, which AdamW would blow up
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 3, 3), nn.Dropout(faults.get("dropout", 0.2)), nn.Flatten(),
            nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 2),
        )  # fmt: skip
        self.net[0].requires_grad_(not faults.get("frozen", 0))
        self.faults = faults

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.training:
            self._suffer(int(batch["sample_number"].min()) // self.faults["batch_size"])
        loss = nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])
        return {"loss": loss}

    def _suffer(self, step: int) -> None:
        if processes().rank != self.faults.get("victim", 0):
            return
        for name, number in SIGNALS.items():
            if self.faults.get(name) == step:
                os.kill(os.getpid(), number)
        if self.faults.get("hang") == step:
            time.sleep(1000)


def start(runs: str, scenario: str) -> str:
    """One start; how it ended: "finished", or the message of what stopped it."""
    name, *words = scenario.split()
    given: Numbers = {key: json.loads(value) for key, value in (w.split("=", 1) for w in words)}
    settings = replace(
        SETTINGS, **{f.name: given.pop(f.name) for f in fields(Fit) if f.name in given}
    )
    precision = given.pop("precision", "no")
    tracking = Tracking(enabled=bool(given.pop("tracked", 0)))
    config = Config(
        name=name, runs=runs, data=Data(dataset="phantom"), tracking=tracking,
        mixed_precision=precision,
    )  # fmt: skip
    run = Run(config, "train-test", ("cam",))
    if run.is_main:
        run.open()
    wait_for_everyone()
    if "file_limit" in given and processes().rank == given.get("victim", 0):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given["file_limit"], hard))
    log = run.folder / f"samples_rank{processes().rank}.txt"
    stream = Stream(Blobs(given.get("bad", -1), log), np.arange(NUM_ITEMS) // 5, seed=1)
    task = Brightness({**given, "batch_size": settings.batch_size})
    try:
        fit(task, stream, settings, run, stream if settings.validate_every else None)
        run.finish({})
    except Stopped as stop:
        return str(stop)
    finally:
        run.close()
    wait_for_everyone()
    return "finished"


def main(runs: str, *scenarios: str) -> int:
    for scenario in scenarios:
        try:
            ended = start(runs, scenario)
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            print(f"rank {processes().rank}: {type(error).__name__}: {error}", flush=True)
            return 1
        print(f"rank {processes().rank}: {ended}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
