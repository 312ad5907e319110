"""Kernels of the denoiser, as plain torch functions."""
