"""Nemotron TwoTower block-diffusion language models in vLLM, as a plugin."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's general plugins; runs in every vLLM process, so it is cheap and idempotent."""
    from vllm import ModelRegistry

    from vllm_twotower.checkpoint import ARCHITECTURE
    from vllm_twotower.config import register_model_config
    from vllm_twotower.patches import install_start_patches

    ModelRegistry.register_model(ARCHITECTURE, "vllm_twotower.model.two_tower:NemotronHTwoTowerForCausalLM")
    register_model_config()
    install_start_patches()
