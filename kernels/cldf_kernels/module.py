"""`SupConLoss`: the loss as a module."""

from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from cldf_kernels.arguments import Backend, Negatives, Precision, Reduction
from cldf_kernels.supcon import supcon_loss


class SupConLoss(nn.Module):
    """`supcon_loss` with its settings held; what belongs to one batch goes to `forward`.

    Arguments and errors are those of `supcon_loss`. A temperature that is an `nn.Parameter` is
    trained with the module. Other tensors are buffers: they move and are saved with it.

    >>> loss = SupConLoss(temperature=0.07)
    >>> loss(embeddings, labels, weight=weight)
    """

    temperature: float | Tensor
    bank: Tensor | None
    bank_labels: Tensor | None

    def __init__(
        self,
        *,
        temperature: float | Float[Tensor, "..."],
        negatives: Negatives = "all",
        bank: Float[Tensor, "entries features"] | None = None,
        bank_labels: Int[Tensor, " entries"] | None = None,
        reduction: Reduction = "mean",
        precision: Precision = "auto",
        deterministic: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.register_buffer("bank", bank)
        self.register_buffer("bank_labels", bank_labels)
        self.negatives = negatives
        self.reduction = reduction
        self.precision = precision
        self.deterministic = deterministic
        self.backend = backend

    def forward(
        self,
        embeddings: Float[Tensor, "pixels features"],
        labels: Int[Tensor, " pixels"],
        *,
        weight: Float[Tensor, " pixels"] | None = None,
        group: Int[Tensor, " pixels"] | None = None,
        process_group: distributed.ProcessGroup | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " pixels"]:
        """Return the loss of one batch; arguments and errors are those of `supcon_loss`."""
        return supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            negatives=self.negatives,
            weight=weight,
            group=group,
            bank=self.bank,
            bank_labels=self.bank_labels,
            reduction=self.reduction,
            process_group=process_group,
            precision=self.precision,
            deterministic=self.deterministic,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        names = ("negatives", "reduction", "precision", "deterministic", "backend")
        settings = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join([f"temperature={self.temperature!r}", *settings])
