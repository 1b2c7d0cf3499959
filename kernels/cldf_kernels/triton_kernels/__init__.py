"""The N x N passes as Triton kernels, one a file; `cldf_kernels.triton_passes` launches them."""
