"""Prototypes: one or several directions per class, with which embeddings are compared."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ITERATIONS = 50  # of k-means, at most; it stops once no point changes its centre


def class_prototypes(
    embeddings: Float[Tensor, "pixels embedding"],
    labels: Int[Tensor, " pixels"],
    per_class: int = 1,
    *,
    seed: int = 0,
) -> Float[Tensor, "prototypes embedding"]:
    """Unit-length directions: `per_class` of background, then `per_class` of object.

    One per class is the mean direction; more are the centres of spherical k-means (Dhillon and
    Modha 2001) within the class. `labels` are `PixelLabel`s; pixels with a negative label are left
    out. Raises ValueError where a class has fewer pixels than prototypes.
    """
    found = []
    for index, name in enumerate(("background", "object")):
        chosen = embeddings[labels == index]
        if len(chosen) == 0:
            raise ValueError(
                f"no {name} pixel among {len(labels)} seeds, so there is no {name} prototype; "
                "loosen seeds.object_threshold or seeds.background_threshold"
            )
        if len(chosen) < per_class:
            raise ValueError(
                f"decoder.prototypes_per_class={per_class} needs as many {name} seeds, there are "
                f"{len(chosen)}"
            )
        if per_class == 1:
            found.append(functional.normalize(chosen.double().mean(0, keepdim=True), dim=1))
        else:
            found.append(spherical_k_means(chosen.double(), per_class, seed=seed))
    return torch.cat(found).to(embeddings.dtype)


def spherical_k_means(
    points: Float[Tensor, "points embedding"], count: int, *, seed: int
) -> Float[Tensor, "centres embedding"]:
    """`count` unit-length centres of at least as many unit-length points, on the CPU.

    The first centres are spread by k-means++ (Arthur and Vassilvitskii 2007). A centre that loses
    all its points stays where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        gap = (1 - (points @ centres.T).amax(1)).clamp(min=1e-12)  # half the squared distance
        centres = torch.cat([centres, points[torch.multinomial(gap, 1, generator=generator)]])
    nearest = torch.full((len(points),), -1)
    for _ in range(ITERATIONS):
        now = (points @ centres.T).argmax(1)
        if torch.equal(now, nearest):
            break
        nearest = now
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        lost = ~sums.any(1, keepdim=True)
        centres = torch.where(lost, centres, functional.normalize(sums, dim=1))
    return centres


def prototype_score(
    embeddings: Float[Tensor, "*pixels embedding"],
    prototypes: Float[Tensor, "prototypes embedding"],
) -> Float[Tensor, "*pixels"]:
    """The object score of each embedding in [0, 1]: 0.5 at equal distance from both classes.

    (cos(z, object) - cos(z, background)) / 2, mapped from [-1, 1] to [0, 1]; of several prototypes
    the nearest of each class counts. `prototypes` are those of `class_prototypes`.
    """
    if len(prototypes) == 2:
        background, objects = prototypes
        difference: Tensor = embeddings @ (objects - background)
    else:
        cosines = embeddings @ prototypes.T
        background, objects = (part.amax(-1) for part in cosines.chunk(2, -1))
        difference = objects - background
    return (difference / 2 + 1) / 2
