"""Patches to vLLM, one module each; imported as ``vllm_twotower.patches``."""
