"""The same kernels in Triton, for GPUs. Each has the arguments and the result of its namesake in torch."""
