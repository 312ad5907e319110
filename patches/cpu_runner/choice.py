"""Lets the TwoTower model have Model Runner V2 on a CPU without Triton (upstream: vllm/config/vllm.py).

vLLM's diffusion models run on Model Runner V2 only, and vLLM's configuration offers that runner only if Triton works.
With this package's CPU kernels it works without. Other models keep vLLM's own choice, since only the TwoTower model
installs those kernels.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def for_two_tower_as_if_with_triton(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap a VllmConfig method so that it reads HAS_TRITON as true if the config is for the TwoTower model.

    The method's code runs against a copy of its module's globals, so nobody else ever sees the changed value.
    """
    with_triton = types.FunctionType(
        method.__code__,
        method.__globals__ | {"HAS_TRITON": True},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )

    @functools.wraps(method)
    def wrapper(self: Any) -> Any:
        return (with_triton if serves_two_tower(self.model_config) else method)(self)

    return wrapper


def choose(upstream: property) -> property:
    """``use_v2_model_runner`` answers for the TwoTower model as it does where Triton works."""
    assert upstream.fget is not None
    return property(for_two_tower_as_if_with_triton(upstream.fget))
