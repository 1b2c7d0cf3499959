"""`naive_supcon`: the definition of the loss, with N x N matrices: the oracle of every test."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from cldf_kernels.arguments import (
    Batch,
    Negatives,
    Reduction,
    refuse_weight,
    weight_breaks_rule,
)


def naive_supcon(
    batch: Batch,
    *,
    temperature: float | Float[Tensor, "..."],
    negatives: Negatives,
    reduction: Reduction,
    dtype: torch.dtype,
) -> Float[Tensor, ""] | Float[Tensor, " pixels"]:
    """Return the loss by plain autograd, in this dtype, with O(N (N + M)) memory.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    z, labels, weight, group = batch.embeddings.to(dtype), batch.labels, batch.weight, batch.group
    bank, bank_labels = batch.bank, batch.bank_labels
    if weight is not None and bool(weight_breaks_rule(weight).any()):
        refuse_weight(weight)
    kept = labels >= 0
    z = torch.where(kept[:, None], z, 0)  # an unknown pixel may hold NaN
    num_pixels = len(z)
    keys, key_labels = z, labels
    meets = torch.ones(num_pixels, num_pixels, dtype=torch.bool, device=z.device)
    meets.fill_diagonal_(False)
    if group is not None:
        meets &= group[:, None] == group[None, :]
    if bank is not None and bank_labels is not None:
        keys = torch.cat([z, torch.where(bank_labels[:, None] >= 0, bank, 0)])
        key_labels = torch.cat([labels, bank_labels])
        meets = torch.cat([meets, meets.new_ones(num_pixels, len(bank))], dim=1)
    meets = meets & kept[:, None] & (key_labels >= 0)[None, :]

    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    scores = z @ keys.T / temperature
    same = labels[:, None] == key_labels[None, :]
    losses, valid = _anchor_losses(
        scores, positive=meets & same, negative=meets & ~same, all_keys=negatives == "all"
    )
    weights = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = (weights * valid).sum()
    return losses.sum() / torch.where(total > 0, total, 1)


def _anchor_losses(
    scores: Float[Tensor, "pixels keys"],
    *,
    positive: Bool[Tensor, "pixels keys"],
    negative: Bool[Tensor, "pixels keys"],
    all_keys: bool,
) -> tuple[Float[Tensor, " pixels"], Bool[Tensor, " pixels"]]:
    """Return the loss of each anchor, and which anchors count; the others have loss 0."""
    num_positives = positive.sum(1)
    valid = num_positives > 0
    denominator = positive | negative if all_keys else negative
    if not all_keys:
        valid = valid & negative.any(1)
    # rows that do not count get a harmless denominator, so that no NaN enters the gradient
    masked = scores.masked_fill(~denominator & valid[:, None], float("-inf"))
    lse = masked.logsumexp(1, keepdim=True)
    terms = lse - scores if all_keys else softplus(lse - scores, threshold=50)
    means = torch.where(positive, terms, 0).sum(1) / num_positives.clamp_min(1)
    return torch.where(valid, means, 0), valid
