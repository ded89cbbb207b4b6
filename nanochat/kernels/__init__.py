"""How a layer is computed on a GPU: Triton kernels of our own, and the way to those of mamba-ssm."""
