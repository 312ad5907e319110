"""Patches to vLLM; imported as ``vllm_twotower.patches``.

Patching is the last resort: every change to vLLM that this project makes at run time is a `Patch` record in ``table``,
with what it does, why, and when it can go. What subclasses override although it is private has an `Override` record.
``tests/unit/test_patches.py`` fails when the vLLM code behind a record changes.

- `install_start_patches` is for ``register()``: it runs in every vLLM process and imports nothing heavy.
- `install_worker_patches` is for the model's ``get_model_state_cls``: it makes Model Runner V2 run without Triton,
  and hands grammars to the sampler.
"""

from vllm_twotower.patches.overrides import OVERRIDES, Override
from vllm_twotower.patches.registry import Patch
from vllm_twotower.patches.table import PATCHES, START_PATCHES, TRACE_PATCHES, WORKER_PATCHES

__all__ = [
    "OVERRIDES",
    "PATCHES",
    "Override",
    "Patch",
    "WORKER_PATCHES",
    "install_start_patches",
    "install_worker_patches",
]

_installed: set[str] = set()


def install_start_patches() -> None:
    """Install what every vLLM process needs from the start. Cheap, and a second call does nothing."""
    _install(START_PATCHES + TRACE_PATCHES)


def install_worker_patches() -> None:
    """Install what a worker needs before its first step. A second call does nothing."""
    _install(WORKER_PATCHES)


def _install(patches: tuple[Patch, ...]) -> None:
    for patch in patches:
        if patch.name not in _installed:
            patch.install()
            _installed.add(patch.name)
