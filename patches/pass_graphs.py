"""CUDA graphs of passes in the place of whole forward passes (upstream: vllm/v1/worker/gpu/model_runner.py)."""

from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def for_two_tower(upstream: Callable) -> Callable:
    """The runner's graphs: those of TwoTower's passes, and any other model's as before."""
    from vllm_twotower.engine.pass_graphs import PassGraphs

    def graphs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        is_two_tower = serves_two_tower(vllm_config.model_config)
        return (PassGraphs if is_two_tower else upstream)(vllm_config, *args, **kwargs)

    return graphs
