"""Checkpoints that travel with the package; imported as ``vllm_twotower.models``."""

from pathlib import Path


def embedded_model() -> Path:
    """The folder of the embedded model: trained from nothing, 2.4 M parameters a tower, held-out problems beside it."""
    return Path(__file__).parent / "tiny-twotower"
