"""Nemotron TwoTower block-diffusion language models in vLLM, as a plugin."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's general plugins; runs in every vLLM process, so it is cheap and idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_twotower.architecture import ARCHITECTURE
    from vllm_twotower.engine_config import TwoTowerModelConfig
    from vllm_twotower.patches import install_start_patches

    ModelRegistry.register_model(ARCHITECTURE, "vllm_twotower.model.two_tower:NemotronHTwoTowerForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = TwoTowerModelConfig
    install_start_patches()
