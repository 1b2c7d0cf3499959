"""`Passes`: the N x N work of the loss, which each backend does in its own way."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Float64
from torch import Tensor

EMPTY_LSE = float("inf")  # the log-sum-exp over no keys: then every softmax weight is 0


@runtime_checkable
class Passes(Protocol):
    """Sums over the keys of each local anchor; s_ij = z_i · k_j / τ.

    Values of anchors and keys are float64, in the order of `PairIndex`. `bank` says whether the
    bank is among the keys.
    """

    def lse_forward(self, z: Float[Tensor, "local features"]) -> Float64[Tensor, " local"]:
        """Return LSE_i = log Σ_j exp(s_ij), `EMPTY_LSE` where there is no key.

        With negatives="other" the sum is over the keys of other classes.
        """

    def lse_backward(
        self,
        z: Float[Tensor, "local features"],
        lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float[Tensor, "local features"]:
        """Return Σ_j (u_i exp(s_ij - LSE_i) + u_j exp(s_ij - LSE_j)) k_j over the same keys."""

    def softplus_forward(
        self, z: Float[Tensor, "local features"], negative_lse: Float64[Tensor, " keys"]
    ) -> tuple[Float64[Tensor, " local"], Float64[Tensor, " local"]]:
        """Return Σ_p softplus(B_i - s_ip) and Σ_p sigmoid(B_i - s_ip) over the positives."""

    def softplus_backward(
        self,
        z: Float[Tensor, "local features"],
        negative_lse: Float64[Tensor, " keys"],
        upstream: Float64[Tensor, " keys"],
        *,
        bank: bool,
    ) -> Float[Tensor, "local features"]:
        """Return Σ_p (u_i sigmoid(B_i - s_ip) + u_p sigmoid(B_p - s_ip)) k_p."""
