"""Train the pixel decoder by a pixel-wise supervised contrastive loss."""

from __future__ import annotations

from typing import Any

from cldf_kernels import SupConLoss
from torch import Tensor, distributed, nn

from cldf_dist.method.noise import sample_dropout, sample_noise
from cldf_dist.nets.decoder import PixelDecoder


class Contrast(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020) between the sampled pixels of all processes.

    A batch holds "features" (batch, pixels, num_features), "labels" (batch, pixels): 1 object,
    0 background, -1 unused, and "sample_number" (batch,). The decoder's dropout and noise are
    drawn here, as functions of (seed, sample number), so that a resumed run repeats them.
    `backend`, `precision` and `deterministic` are those of `cldf_kernels.supcon_loss`.
    """

    accumulates = False  # splitting a batch would change every pixel's negatives
    autocast = False

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
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"decoder.contrast.temperature must be > 0, got {temperature}")
        self.net = net
        options: Any = {
            "temperature": temperature,
            "backend": backend,
            "precision": precision,
            "deterministic": deterministic,
        }
        self.loss = SupConLoss(**options)
        self.seed = seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, numbers = batch["features"], batch["sample_number"]
        scale = shift = None
        if self.training:
            shape, device = features.shape[1:], features.device
            if self.net.dropout > 0:
                scale = sample_dropout(shape, numbers, self.seed, self.net.dropout, device)
            if self.net.noise > 0:
                draws = sample_noise(shape, numbers, self.seed, "feature noise", device)
                shift = self.net.noise * draws
        embeddings = self.net(features, scale=scale, shift=shift)
        together = distributed.is_available() and distributed.is_initialized()
        loss: Tensor = self.loss(
            embeddings.flatten(0, 1),
            batch["labels"].to(features.device).flatten(),
            process_group=distributed.group.WORLD if together else None,
        )
        return {"loss": loss}
