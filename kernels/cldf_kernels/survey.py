"""What the host must know of the pixels before it plans its work: one read of the device."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cldf_kernels.arguments import refuse_weight, weight_breaks_rule
from cldf_kernels.gather import Ranks


@dataclass(frozen=True)
class Facts:
    """Of the labelled pixels, but for the first number."""

    num_unknown: int  # pixels of this rank without a label
    max_label: int  # of all ranks; -1: there is none
    largest: float  # |z|^2 of all ranks; NaN where one is
    weighted: bool  # whether any rank gave weights


NOTHING = [0.0, -1.0, 0.0, 0.0]  # what no pixels measure
NUM_ROWS, WEIGHTED = 4, 5  # places behind these


def survey(
    z: Tensor, labels: Tensor, weight: Tensor | None, process_group: dist.ProcessGroup | None
) -> tuple[Facts, Ranks | None]:
    """Read the facts, and meet the ranks that share the loss, with a single wait for the device.

    Raises ValueError for a weight that breaks its rule.
    """
    measured = _measure(z, labels, weight) if len(z) else None
    ranks = None
    if process_group is None:
        own = NOTHING if measured is None else measured.tolist()
        everyone = [own]
    else:
        everyone = _gathered(measured, len(z), weight is not None, process_group, z.device)
        rank = dist.get_rank(process_group)
        own = everyone[rank]
        ranks = Ranks(process_group, rank, tuple(int(f[NUM_ROWS] - f[0]) for f in everyone))
    if weight is not None and own[3]:
        refuse_weight(weight)
    norms = [facts[2] for facts in everyone]
    facts = Facts(
        num_unknown=int(own[0]),
        max_label=int(max(facts[1] for facts in everyone)),
        largest=math.nan if any(map(math.isnan, norms)) else max(norms) ** 2,
        weighted=weight is not None if ranks is None else any(f[WEIGHTED] for f in everyone),
    )
    return facts, ranks


def _measure(z: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Number of unknown pixels, largest label, largest norm, number of wrong weights: float64."""
    unknown = labels < 0
    norms = torch.linalg.vector_norm(z, dim=1).masked_fill_(unknown, 0)  # unknown: may be NaN
    num_unknown = unknown.sum()
    # without weights nobody reads the last number
    num_wrong = num_unknown if weight is None else weight_breaks_rule(weight).sum()
    return torch.stack([num_unknown, labels.max(), norms.max().double(), num_wrong])


def _gathered(
    measured: Tensor | None,
    num_rows: int,
    weighted: bool,
    process_group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[float]]:
    """What every rank has measured, its number of rows, and whether it has weights."""
    known = torch.tensor([*NOTHING, num_rows, weighted], dtype=torch.float64, device=device)
    own = known if measured is None else torch.cat([measured, known[NUM_ROWS:]])
    received = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(received, own, group=process_group)
    everyone: list[list[float]] = torch.stack(received).tolist()
    return everyone
