"""Sweeps and ablations through the engine: ``vllm-twotower experiment``."""
