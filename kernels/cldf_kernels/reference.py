"""`supcon_reference`: the loss by its definition."""

from jaxtyping import Float, Int
from torch import Tensor

from cldf_kernels.arguments import Negatives, Reduction
from cldf_kernels.supcon import supcon_loss


def supcon_reference(
    embeddings: Float[Tensor, "pixels features"],
    labels: Int[Tensor, " pixels"],
    *,
    temperature: float | Float[Tensor, "..."],
    negatives: Negatives = "all",
    weight: Float[Tensor, " pixels"] | None = None,
    group: Int[Tensor, " pixels"] | None = None,
    bank: Float[Tensor, "entries features"] | None = None,
    bank_labels: Int[Tensor, " entries"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " pixels"]:
    """Return the same loss by its definition, N x N and differentiable any number of times.

    Computes in the dtype of the embeddings; in float64 it is the oracle of the tests. Arguments
    and errors are those of `supcon_loss`.
    """
    return supcon_loss(
        embeddings,
        labels,
        temperature=temperature,
        negatives=negatives,
        weight=weight,
        group=group,
        bank=bank,
        bank_labels=bank_labels,
        reduction=reduction,
        backend="reference",
    )
