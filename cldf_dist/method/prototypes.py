"""Prototypes: one direction per class, to which pixels are compared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def class_prototypes(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Unit-length (2, embedding): the mean directions of background (row 0) and object (row 1).

    `embeddings` is (pixels, embedding), `labels` (pixels,) holds 1 object, 0 background and
    negative numbers for pixels that do not count. Raises ValueError where a class has no pixel.
    """
    means = []
    for index, name in enumerate(("background", "object")):
        chosen = embeddings[labels == index]
        if len(chosen) == 0:
            raise ValueError(
                f"no {name} pixel among {len(labels)} seeds, so there is no {name} prototype; "
                "loosen seeds.foreground or seeds.background"
            )
        means.append(chosen.double().mean(0))
    return functional.normalize(torch.stack(means), dim=1).to(embeddings.dtype)


def prototype_score(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """How much nearer to the object: (..., embedding) -> (...) in [0, 1], 0.5 in the middle.

    (cos(z, object) - cos(z, background)) / 2, mapped from [-1, 1] to [0, 1].
    """
    background, objects = prototypes
    difference: Tensor = embeddings @ (objects - background)
    return (difference / 2 + 1) / 2
