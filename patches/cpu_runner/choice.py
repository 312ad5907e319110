"""Lets the TwoTower model have Model Runner V2 on a CPU without Triton (upstream: vllm/config/vllm.py,
vllm/v1/worker/gpu_worker.py).

vLLM's diffusion models run on Model Runner V2 only, and vLLM offers that runner only if Triton works.
With this package's CPU kernels it works without. Other models keep vLLM's own choice, since only the TwoTower model
installs those kernels.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def for_two_tower_as_if_with_triton(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap a VllmConfig method so that it reads HAS_TRITON as true if the config is for the TwoTower model."""
    with_triton = _as_if_with_triton(method)

    @functools.wraps(method)
    def wrapper(self: Any) -> Any:
        return (with_triton if serves_two_tower(self.model_config) else method)(self)

    return wrapper


def of_worker(upstream_init: Callable) -> Callable:
    """Let a worker read HAS_TRITON as true if it is one of the TwoTower model."""
    with_triton = _as_if_with_triton(upstream_init)

    @functools.wraps(upstream_init)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        chosen = with_triton if serves_two_tower(vllm_config.model_config) else upstream_init
        chosen(self, vllm_config, *args, **kwargs)

    return init


def _as_if_with_triton(function: Callable) -> Callable:
    """The function's code with a copy of its module's globals, so nobody else ever sees the changed value."""
    return types.FunctionType(
        function.__code__,
        function.__globals__ | {"HAS_TRITON": True},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def choose(upstream: property) -> property:
    """``use_v2_model_runner`` answers for the TwoTower model as it does where Triton works."""
    assert upstream.fget is not None
    return property(for_two_tower_as_if_with_triton(upstream.fget))
