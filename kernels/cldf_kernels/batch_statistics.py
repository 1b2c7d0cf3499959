"""`batch_statistics`: what the host must know of a batch, by one read of the device."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cldf_kernels.arguments import refuse_weight, weight_breaks_rule
from cldf_kernels.ranks import Ranks


@dataclass(frozen=True)
class BatchStatistics:
    """Numbers over the labelled pixels of all ranks, but for `num_unlabelled`."""

    num_unlabelled: int  # pixels of this rank alone that have no label
    max_label: int  # -1: no pixel has one
    max_squared_norm: float  # largest |z|^2; NaN where one is
    has_weights: bool  # whether any rank gave weights


EMPTY_BATCH = [0.0, -1.0, 0.0, 0.0]  # the measurements where there are no pixels
NUM_PIXELS, HAS_WEIGHTS = 4, 5  # positions of two further numbers of each rank, behind these


def batch_statistics(
    z: Float[Tensor, "pixels features"],
    labels: Int[Tensor, " pixels"],
    weight: Float[Tensor, " pixels"] | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[BatchStatistics, Ranks | None]:
    """Measure the batch, on all ranks that share the loss, with a single wait for the device.

    Returns:
        The statistics, and the ranks that share the loss; None without a `process_group`.

    Raises:
        ValueError: a weight of this rank is negative or not finite.
    """
    measured = _measure(z, labels, weight) if len(z) else None
    ranks = None
    if process_group is None:
        own = EMPTY_BATCH if measured is None else measured.tolist()
        of_ranks = [own]
    else:
        of_ranks = _gather(measured, len(z), weight is not None, process_group, z.device)
        rank = dist.get_rank(process_group)
        own = of_ranks[rank]
        num_anchors = tuple(int(numbers[NUM_PIXELS] - numbers[0]) for numbers in of_ranks)
        ranks = Ranks(process_group, rank, num_anchors)
    if weight is not None and own[3]:
        refuse_weight(weight)
    norms = [numbers[2] for numbers in of_ranks]
    statistics = BatchStatistics(
        num_unlabelled=int(own[0]),
        max_label=int(max(numbers[1] for numbers in of_ranks)),
        max_squared_norm=math.nan if any(map(math.isnan, norms)) else max(norms) ** 2,
        has_weights=(
            weight is not None if ranks is None else any(n[HAS_WEIGHTS] for n in of_ranks)
        ),
    )
    return statistics, ranks


def _measure(z: Tensor, labels: Tensor, weight: Tensor | None) -> Float64[Tensor, "4"]:
    """Return number of unlabelled pixels, largest label, largest norm, number of bad weights."""
    unlabelled = labels < 0
    norms = torch.linalg.vector_norm(z, dim=1).masked_fill_(unlabelled, 0)  # those may be NaN
    num_unlabelled = unlabelled.sum()
    # without weights nobody reads the last number
    num_bad = num_unlabelled if weight is None else weight_breaks_rule(weight).sum()
    return torch.stack([num_unlabelled, labels.max(), norms.max().double(), num_bad])


def _gather(
    measured: Tensor | None,
    num_pixels: int,
    has_weights: bool,
    process_group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[float]]:
    """Return each rank's measurements, number of pixels, and 1.0 where it has weights."""
    known = torch.tensor(
        [*EMPTY_BATCH, num_pixels, has_weights], dtype=torch.float64, device=device
    )
    own = known if measured is None else torch.cat([measured, known[NUM_PIXELS:]])
    received = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(received, own, group=process_group)
    of_ranks: list[list[float]] = torch.stack(received).tolist()
    return of_ranks
