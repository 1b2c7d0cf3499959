"""Train the pixel decoder by a pixel-wise supervised contrastive loss, or by cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from cldf_kernels import SupConLoss
from torch import Tensor, distributed, nn
from torch.nn import functional

from cldf_dist.method.noise import sample_dropout, sample_noise
from cldf_dist.nets.decoder import PixelDecoder


class OfPixels(nn.Module):
    """What is learnt from the sampled pixels of all processes.

    A batch holds "features" (batch, pixels, num_features), "labels" (batch, pixels): 1 object,
    0 background, -1 unused, and "sample_number" (batch,). The decoder's dropout and noise are
    drawn here, as functions of (seed, sample number), so that a resumed run repeats them.
    """

    accumulates = False  # splitting a batch would change every pixel's negatives
    autocast = False

    def __init__(self, net: PixelDecoder, *, temperature: float, seed: int) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"decoder.contrast.temperature must be > 0, got {temperature}")
        self.net = net
        self.temperature = temperature
        self.seed = seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        embeddings = self._embeddings(batch["features"], batch["sample_number"])
        labels = batch["labels"].to(embeddings.device)
        return {"loss": self.pixel_loss(embeddings.flatten(0, 1), labels.flatten())}

    def pixel_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Of unit-length embeddings (pixels, embedding) and labels (pixels,)."""
        raise NotImplementedError

    def _embeddings(self, features: Tensor, numbers: Tensor) -> Tensor:
        scale = shift = None
        if self.training:
            shape, device = features.shape[1:], features.device
            if self.net.dropout > 0:
                scale = sample_dropout(shape, numbers, self.seed, self.net.dropout, device)
            if self.net.noise > 0:
                draws = sample_noise(shape, numbers, self.seed, "feature noise", device)
                shift = self.net.noise * draws
        embeddings: Tensor = self.net(features, scale=scale, shift=shift)
        return embeddings


class Contrast(OfPixels):
    """Supervised contrastive loss (Khosla et al. 2020) between the pixels.

    `backend`, `precision` and `deterministic` are those of `cldf_kernels.supcon_loss`.
    """

    def __init__(
        self,
        net: PixelDecoder,
        *,
        temperature: float,
        seed: int = 0,
        backend: str = "auto",
        precision: str = "auto",
        deterministic: bool = False,
    ) -> None:
        super().__init__(net, temperature=temperature, seed=seed)
        options: Any = {
            "temperature": temperature,
            "backend": backend,
            "precision": precision,
            "deterministic": deterministic,
        }
        self.loss = SupConLoss(**options)

    def pixel_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        group = distributed.group.WORLD if _several() else None
        loss: Tensor = self.loss(embeddings, labels, process_group=group)
        return loss


class CrossEntropy(OfPixels):
    """Cross-entropy of a linear classifier of the embeddings: what the contrast is compared with.

    The logit of a class is the cosine to its learnt direction, over the temperature. The directions
    serve the training alone; pixels are scored by prototypes, as after the contrastive loss.
    """

    def __init__(self, net: PixelDecoder, *, temperature: float, seed: int = 0) -> None:
        super().__init__(net, temperature=temperature, seed=seed)
        self.directions = nn.Parameter(torch.randn(2, net.num_dimensions))

    def pixel_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        used = labels >= 0
        logits = embeddings[used] @ functional.normalize(self.directions, dim=1).T
        total = functional.cross_entropy(logits / self.temperature, labels[used], reduction="sum")
        count, world_size = used.sum().to(total.dtype), 1
        if _several():  # gradients are averaged over the processes: each gives its share
            distributed.all_reduce(count)
            world_size = distributed.get_world_size()
        return total * world_size / count.clamp(min=1)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
