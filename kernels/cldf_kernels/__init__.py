"""Exact supervised contrastive loss for many pixels, without the N x N matrix."""

from cldf_kernels.arguments import Backend, Negatives, Precision, Reduction
from cldf_kernels.module import SupConLoss
from cldf_kernels.reference import supcon_reference
from cldf_kernels.supcon import supcon_loss

__all__ = [
    "Backend",
    "Negatives",
    "Precision",
    "Reduction",
    "SupConLoss",
    "supcon_loss",
    "supcon_reference",
]
