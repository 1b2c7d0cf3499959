"""Torch modules, tensors in and tensors out, built on MONAI."""
