"""Patches to vLLM, one module per group; imported as ``vllm_twotower.patches``.

Patching is the last resort: every change to vLLM that this project makes at run time is a `Patch` record here, with
what it does, why, and when it can go. What subclasses override although it is private has an `Override` record.
``tests/unit/test_patches.py`` fails when the vLLM code behind a record changes.

- `install_start_patches` is for ``register()``: it runs in every vLLM process and imports nothing heavy.
- `install_worker_patches` is for the model's ``get_model_state_cls``: it makes Model Runner V2 run without Triton,
  and hands grammars to the sampler.
"""

from vllm_twotower.patches.overrides import OVERRIDES, Override
from vllm_twotower.patches.registry import Patch, all_patches, install_start_patches, install_worker_patches

__all__ = ["OVERRIDES", "Override", "Patch", "all_patches", "install_start_patches", "install_worker_patches"]
