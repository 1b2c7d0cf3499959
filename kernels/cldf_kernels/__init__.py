"""Exact supervised contrastive loss for many pixels, without the N x N matrix."""

from cldf_kernels.supcon import SupConLoss, supcon_loss, supcon_reference

__all__ = ["SupConLoss", "supcon_loss", "supcon_reference"]
