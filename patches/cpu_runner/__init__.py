"""vLLM's Model Runner V2 on a CPU without Triton: what it needs of kernels, in numpy and torch."""
