"""Nemotron TwoTower block-diffusion language models in vLLM, as a plugin."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's general plugins; runs in every vLLM process, so it must be cheap and idempotent."""
