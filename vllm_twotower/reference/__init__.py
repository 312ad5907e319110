"""The whole TwoTower in plain PyTorch: the oracle of the tests, the model to train, the baseline of the benchmarks."""

from vllm_twotower.architecture import TwoTowerConfig

from .generate import Generation, generate_ar, generate_mask_diffusion, generate_mock_ar, unmask_confident
from .model import TwoTowerModel

__all__ = [
    "Generation",
    "TwoTowerConfig",
    "TwoTowerModel",
    "generate_ar",
    "generate_mask_diffusion",
    "generate_mock_ar",
    "unmask_confident",
]
