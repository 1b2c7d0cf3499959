"""What the training benchmark trains: nets of the configurations, the bare loop, phantom slices."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cldf_dist.cli.pipeline import run_stage
from cldf_dist.config import Config, load
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import noise_schedule
from cldf_dist.nets.unet import build_unet
from cldf_dist.stages import stage_named
from cldf_dist.tasks.denoise import Denoise
from cldf_dist.training.engine import autocast
from cldf_dist.training.schedule import learning_rate

ROOT = Path(__file__).parents[1]


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


@dataclass(frozen=True)
class Size:
    parameters: int
    gflop_per_image: float  # one forward, and twice as much for the backward


def size_of(config: Config) -> Size:
    """As `cldf_dist.training.throughput` counts, but on the meta device: nothing is computed."""
    net, side = meta_net(config), config.data.image_size
    images = torch.empty(1, len(datasets.channels(config.data)), side, side, device="meta")
    zeros = torch.empty(1, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images, zeros, class_labels=zeros)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Size(parameters, 3 * counter.get_total_flops() / 1e9)


def meta_net(config: Config) -> nn.Module:
    """The net without memory for its weights."""
    with torch.device("meta"):
        return build_unet(config.diffusion.net, len(datasets.channels(config.data)))


def make_task(config: Config) -> Denoise:
    """The diffusion model's task as its stage makes it, without previews."""
    torch.manual_seed(config.seed)
    return Denoise(
        build_unet(config.diffusion.net, len(datasets.channels(config.data))),
        noise_schedule(config),
        min_snr_gamma=config.diffusion.min_snr_gamma,
        label_dropout=config.diffusion.label_dropout,
        seed=config.seed,
    )


def prepare_slices(config: Config) -> None:
    """Write the phantom's shards into the run's folder, unless they are there."""
    run_stage(config, stage_named("prepare"))


def made_up_batches(config: Config, device: torch.device, count: int) -> list[dict[str, Tensor]]:
    """Made-up slices; sample numbers stay on the host, as in `cldf_dist.training.prefetch`."""
    size, side = config.diffusion.fit.batch_size, config.data.image_size
    channels = len(datasets.channels(config.data))
    generator = torch.Generator(device).manual_seed(0)
    shape = (size, channels, side, side)
    return [
        {
            "image": torch.rand(shape, generator=generator, device=device) * 2 - 1,
            "label": torch.randint(2, (size,), generator=generator, device=device),
            "sample_number": torch.arange(number * size, (number + 1) * size),
        }
        for number in range(count)
    ]


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
