"""The N x N work as Triton kernels, one a file; `cldf_kernels.triton_passes` launches them."""
