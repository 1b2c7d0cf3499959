"""What the benchmarks train: nets of the configurations, `fit` alone, and a bare loop beside it."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cldf_dist.config import Config, Fit, load
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import place
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.stages import stage_named
from cldf_dist.stages.tune_label_embedding import tell_apart
from cldf_dist.system.distributed import wait_for_everyone
from cldf_dist.training.engine import autocast
from cldf_dist.training.fit import Batch, Batches, fit
from cldf_dist.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
DIFFUSION = "train-diffusion"


@dataclass(frozen=True)
class Case:
    """A net, its image and its batch: configuration files, and settings laid over them."""

    files: tuple[str, ...]
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((*self.files, *self.words))

    def config(self, *words: str) -> Config:
        return load([str(ROOT / file) for file in self.files], [*self.words, *words])

    def config_in(self, folder: Path, *words: str) -> Config:
        """With its runs in a folder, and no tracking."""
        return self.config(f"runs={folder}", "tracking.enabled=false", *words)


DEBUG = Case(("configs/debug.yaml",))
DEMO = Case(("configs/demo.yaml",))
SMALL = Case(("configs/brats.yaml", "configs/small.yaml"))
BRATS = Case(("configs/brats.yaml",))
# the demo's net on pictures so small that what `fit` adds is no longer lost in the noise
SMALL_PICTURES = Case(DEMO.files, ("data.image_size=16", "diffusion.fit.batch_size=1"))
# the slices of the phantom take the place of those of BraTS
BRATS_256 = Case(
    BRATS.files,
    (
        "data.dataset=phantom",
        "data.image_size=256",
        "data.phantom.num_patients=12",
        "data.slices_per_shard=32",
    ),
)
# the sizes of a 256x256 guided-diffusion (Dhariwal and Nichol 2021) of 128 base channels times
# 1, 1, 2, 2, 4, 4 in MONAI's net, which attends at 16x16 and, as every such net, in the middle
GUIDED_DIFFUSION = Case(
    DEMO.files,
    (
        "data.image_size=256",
        "diffusion.net.channels=[128,128,256,256,512,512]",
        "diffusion.net.num_res_blocks=2",
        "diffusion.net.attention_levels=[false,false,false,false,true,false]",
        "diffusion.net.num_head_channels=64",
        "diffusion.net.norm_num_groups=32",
        "diffusion.fit.batch_size=1",
    ),
)


def num_channels(config: Config) -> int:
    return len(datasets.channels(config.data))


def meta_net(config: Config) -> nn.Module:
    """The diffusion model without memory for its weights."""
    with torch.device("meta"):
        return build_unet(config.diffusion.net, num_channels(config))


def size_of(config: Config) -> dict[str, float]:
    """The diffusion model's `parameters` and `gflop_per_image`: a forward, and twice that back.

    As `cldf_dist.training.throughput` counts, but on the meta device: nothing is computed.
    """
    net, side = meta_net(config), config.data.image_size
    images = torch.empty(1, num_channels(config), side, side, device="meta")
    zeros = torch.empty(1, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images, zeros, class_labels=zeros)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"parameters": parameters, "gflop_per_image": 3 * counter.get_total_flops() / 1e9}


def make_task(config: Config, stage: str = DIFFUSION) -> nn.Module:
    """The task of a stage that trains on slices, made by the stage itself, its nets untrained."""
    if stage == "tune-label-embedding":
        return tell_apart(config, place(build_unet(config.diffusion.net, num_channels(config))))
    task: nn.Module = stage_named(stage).module._task(config, num_channels(config))
    return task


class Enough(Exception):
    """The time is over: what was measured is known."""


def run_fit(
    config: Config, stage: str, task: nn.Module, stream: Batches, settings: Fit
) -> list[dict[str, Any]]:
    """Train from the start with no checkpoints, validation or previews; the lines of the log.

    The stream may end it by raising `Enough`.
    """
    settings = replace(settings, checkpoint_every=0, validate_every=0, preview_every=0)
    run = Run(config, stage, ())
    if run.is_main:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.open()
    wait_for_everyone()
    try:
        with suppress(Enough):
            fit(task, stream, settings, run)
        log = run.folder / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if run.is_main else []
    finally:
        run.close()


class Watched:
    """A stream with a context around the use of each batch: from its arrival to the next call."""

    def __init__(
        self, stream: Batches, around: Callable[[Batch], AbstractContextManager[None]]
    ) -> None:
        self._stream, self._around = stream, around
        self.fingerprint, self.fixed = stream.fingerprint, stream.fixed

    def batches(self, consumed: int, **place: Any) -> Iterator[Batch]:
        batches = self._stream.batches(consumed, **place)
        try:
            for batch in batches:
                with self._around(batch):
                    yield batch
        finally:
            close = getattr(batches, "close", None)
            if close is not None:  # ends loader workers
                close()


class BareLoop:
    """One optimizer step and no more: forward, backward, clipping, AdamW, gradients dropped.

    The learning rate is set at each step, as `fit` does. No moving average, no look at whether the
    gradient is finite, no means, no seed and no log.
    """

    def __init__(
        self, task: nn.Module, config: Config, *, fused: bool = True, dtype: Any = None
    ) -> None:
        self.task, self.dtype = task.train(), dtype
        self._settings = config.diffusion.fit
        self._parameters = list(task.parameters())
        self._device = self._parameters[0].device
        self._step = 0
        self._optimizer = torch.optim.AdamW(
            self._parameters, weight_decay=self._settings.weight_decay, fused=fused
        )

    def step(self, batch: Mapping[str, Any]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, self._settings)
        with autocast(self._device, self.dtype):
            loss = self.task(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1


@contextmanager
def arithmetic(*, tf32: bool = True) -> Iterator[None]:
    """Denormals are zero, and on GPUs float32 products are TF32, as in the training stages."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
