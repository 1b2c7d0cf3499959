"""The exact gradient of the loss from the sums that `Passes` takes.

With s_ij = z_i · z_j / τ, u_i = d loss / d L_i, S the sum of z and G the sum of u_j z_j over the
positive set of i:

    τ dz_i = Σ_{j ≠ i} (u_i exp(s_ij - LSE_i) + u_j exp(s_ij - LSE_j)) z_j
             - (u_i S + G - 2 u_i z_i) / m_i

so that labels enter only O(N D) work. With negatives="other" the positives meet pair by pair, and
v_i = u_i / m_i Σ_p sigmoid(B_i - s_ip) takes the place of u_i in the first sum:

    τ dz_i = Σ_n (v_i exp(s_in - B_i) + v_n exp(s_in - B_n)) z_n
             - Σ_p (u_i / m_i sigmoid(B_i - s_ip) + u_p / m_p sigmoid(B_p - s_ip)) z_p
"""

import functools

from jaxtyping import Float, Float64
from torch import Tensor

from cldf_kernels.pair_index import PairIndex
from cldf_kernels.passes import EMPTY_LSE, Passes
from cldf_kernels.segment_sum import segment_sum


def scaled_gradient(
    z: Float[Tensor, "local features"],
    index: PairIndex,
    passes: Passes,
    *,
    lse: Float64[Tensor, " anchors"],
    mean_sigmoids: Float64[Tensor, " anchors"] | None,
    upstream: Float64[Tensor, " anchors"],
    bank: bool,
    deterministic: bool,
) -> Float[Tensor, "local features"]:
    """Return τ d loss / dz.

    Args:
        z: the local anchors.
        index: the keys of all ranks.
        passes: the backend that takes the sums.
        lse: LSE_i of each anchor; B_i with negatives="other".
        mean_sigmoids: with negatives="other", the mean of sigmoid(B_i - s_ip) over the positives.
        upstream: u_i of each anchor.
        bank: whether the bank is among the keys.
        deterministic: whether sums must be taken in an order that never changes.
    """
    if mean_sigmoids is None:
        dz = _repulsion(z, index, passes, lse, upstream, bank=bank)
        return _subtract_attraction(dz, z, index, upstream, bank=bank, deterministic=deterministic)
    dz = _repulsion(z, index, passes, lse, upstream * mean_sigmoids, bank=bank)
    upstream = index.per_key(upstream / index.num_positives, of_bank=0.0)
    negative_lse = finite_per_key(index, lse)
    return dz.sub_(passes.softplus_backward(z, negative_lse, upstream, bank=bank))


def finite_per_key(index: PairIndex, lse: Float64[Tensor, " anchors"]) -> Float64[Tensor, " keys"]:
    """Return B of every key; any finite number for one without a negative, whose weight is 0."""
    return index.per_key(lse.masked_fill(lse == EMPTY_LSE, 0), of_bank=0.0)


def _repulsion(
    z: Tensor, index: PairIndex, passes: Passes, lse: Tensor, upstream: Tensor, *, bank: bool
) -> Tensor:
    return passes.lse_backward(
        z, index.per_key(lse, of_bank=EMPTY_LSE), index.per_key(upstream, of_bank=0.0), bank=bank
    )


def _subtract_attraction(
    dz: Tensor, z: Tensor, index: PairIndex, upstream: Tensor, *, bank: bool, deterministic: bool
) -> Tensor:
    """Subtract (u_i S + G - 2 u_i z_i) / m_i from `dz`, in place."""
    num_local = len(z)
    sets, coefficients = index.positive_sets[:num_local], upstream[:num_local]
    coefficients = (coefficients / index.num_positives[:num_local]).to(z.dtype)[:, None]
    if index.uniform and index.num_keys == index.num_anchors:  # G = u_i S
        attraction = index.positive_sums.index_select(0, sets).sub_(z)
        return dz.addcmul_(attraction, coefficients, value=-2)
    sum_sets = functools.partial(
        segment_sum,
        index.keys(z)[: index.num_anchors],
        index.positive_sets,
        len(index.positive_sums),
        deterministic=deterministic,
    )
    sums = index.positive_sums if bank else sum_sets()  # S
    attraction = sums.index_select(0, sets).sub_(z, alpha=2)
    dz.addcmul_(attraction, coefficients, value=-1)
    weighted_sums = sum_sets(weights=upstream).index_select(0, sets)  # G
    return dz.sub_(weighted_sums.div_(index.num_positives[:num_local, None]))
