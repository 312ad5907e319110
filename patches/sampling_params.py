"""Replaces the check of a request's sampling parameters for the TwoTower model (upstream: vllm/sampling_params.py)."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def with_our_rules(upstream_validate: Callable) -> Callable:
    """Check a TwoTower request with this package's own rules, any other request with vLLM's."""

    @functools.wraps(upstream_validate)
    def validate(self: Any, model_config: Any) -> None:
        if not serves_two_tower(model_config):
            upstream_validate(self, model_config)
            return
        from vllm_twotower.options import validate_sampling_params

        validate_sampling_params(self, model_config)

    return validate
