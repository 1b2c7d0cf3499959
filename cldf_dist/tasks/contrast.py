"""The tasks that train the pixel decoder: by a supervised contrastive loss, or cross-entropy."""

from __future__ import annotations

import torch
from cldf_kernels import Backend, Precision, supcon_loss
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.nn import functional

from cldf_dist.method.noise import sample_dropout, sample_noise
from cldf_dist.nets.decoder import PixelDecoder


class Contrast(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020) between the sampled pixels of all processes.

    A batch holds "features" (batch, pixels, features), "labels" (batch, pixels), a `PixelLabel`
    each, and "sample_number" (batch,). The decoder's dropout and noise are drawn here, as functions
    of (seed, sample number), so that a resumed run repeats them. `backend`, `precision` and
    `deterministic` are those of `cldf_kernels.supcon_loss`. Raises ValueError unless
    `temperature` > 0.
    """

    accumulates = False  # splitting a batch would change every pixel's negatives
    autocast = False

    def __init__(
        self,
        net: PixelDecoder,
        *,
        temperature: float,
        seed: int = 0,
        backend: Backend = "auto",
        precision: Precision = "auto",
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.net = net
        self.temperature = temperature
        self.seed = seed
        self.backend = backend
        self.precision = precision
        self.deterministic = deterministic

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The "loss" over the pixels of all processes."""
        embeddings, labels = embedded_pixels(self.net, batch, self.seed, training=self.training)
        group = distributed.group.WORLD if _has_group() else None
        loss = supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            process_group=group,
            precision=self.precision,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return {"loss": loss}


class CrossEntropy(nn.Module):
    """Cross-entropy of a linear classifier of the embeddings: the baseline of the contrastive loss.

    The logit of a class is the cosine to its learnt direction, divided by the temperature. The
    directions are used in training alone; pixels are scored by prototypes, as after the contrastive
    loss. A batch is that of `Contrast`. The gradient is that of the mean over the pixels of all
    processes. Raises ValueError unless `temperature` > 0.
    """

    autocast = False

    def __init__(self, net: PixelDecoder, *, temperature: float, seed: int) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.net = net
        self.temperature = temperature
        self.seed = seed
        self.directions = nn.Parameter(torch.randn(2, net.num_dimensions))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The "loss", scaled so that its mean over the processes is that over all their pixels."""
        embeddings, labels = embedded_pixels(self.net, batch, self.seed, training=self.training)
        used = labels >= 0
        logits = embeddings[used] @ functional.normalize(self.directions, dim=1).T
        total = functional.cross_entropy(logits / self.temperature, labels[used], reduction="sum")
        count, world_size = used.sum().to(total.dtype), 1
        if _has_group():  # gradients are averaged over the processes: each gives its part
            distributed.all_reduce(count)
            world_size = distributed.get_world_size()
        return {"loss": total * world_size / count.clamp(min=1)}


def embedded_pixels(
    net: PixelDecoder, batch: dict[str, Tensor], seed: int, *, training: bool
) -> tuple[Float[Tensor, "pixels embedding"], Int[Tensor, " pixels"]]:
    """Embeddings and labels of the pixels of a batch of `Contrast`; perturbed in `training`."""
    features, numbers = batch["features"], batch["sample_number"]
    scale = shift = None
    if training:
        shape, device = features.shape[1:], features.device
        if net.dropout > 0:
            scale = sample_dropout(shape, numbers, seed, net.dropout, device)
        if net.noise > 0:
            shift = net.noise * sample_noise(shape, numbers, seed, "feature noise", device)
    embeddings: Tensor = net(features, scale=scale, shift=shift)
    return embeddings.flatten(0, 1), batch["labels"].to(features.device).flatten()


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"decoder.contrast.temperature must be > 0, got {temperature}")


def _has_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
