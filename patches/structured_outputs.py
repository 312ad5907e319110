"""Grammars for the autoregressive requests of TwoTower (upstream: vllm/sampling_params.py)."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


class AsIfCausal:
    """A ModelConfig that says it is not a diffusion model's."""

    is_diffusion = False

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_config, name)


def as_for_causal_models(upstream_validate: Callable) -> Callable:
    """Check a TwoTower request's grammar as a causal model's: ``_validate_diffusion`` has refused it for blocks."""

    @functools.wraps(upstream_validate)
    def validate(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        upstream_validate(
            self, AsIfCausal(model_config) if serves_two_tower(model_config) else model_config, *args, **kwargs
        )

    return validate
