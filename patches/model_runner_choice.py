"""Lets the TwoTower model have Model Runner V2 on a CPU without Triton (upstream: vllm/config/vllm.py).

vLLM's diffusion models run on Model Runner V2 only, and vLLM's configuration offers that runner only if Triton works.
With this package's CPU kernels it works without. Other models keep vLLM's own choice, since only the TwoTower model
installs those kernels.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import Patch, locate, replace, runs_on_cpu_without_triton, serves_two_tower

CHOICE = "vllm.config.vllm:VllmConfig.use_v2_model_runner"
VALIDATION = "vllm.config.vllm:VllmConfig._validate_v2_model_runner"


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


def install_choice() -> None:
    """Make ``use_v2_model_runner`` answer for the TwoTower model as it does where Triton works."""
    holder, name = locate(CHOICE)
    replace(CHOICE, property(for_two_tower_as_if_with_triton(vars(holder)[name].fget)))


def install_validation() -> None:
    """Make the check of the chosen runner accept the TwoTower model without Triton."""
    holder, name = locate(VALIDATION)
    replace(VALIDATION, for_two_tower_as_if_with_triton(getattr(holder, name)))


_UPSTREAM = "https://github.com/vllm-project/vllm/pull/55847 and https://github.com/vllm-project/vllm/issues/57684"
_REMOVE_WHEN = "vLLM offers Model Runner V2 on a CPU without Triton"

PATCHES = (
    Patch(
        name="model-runner-choice",
        target=CHOICE,
        what="VllmConfig.use_v2_model_runner does not ask for Triton if the model is TwoTower.",
        why="vLLM falls back to Model Runner V1, which cannot run diffusion models.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        applies_when=runs_on_cpu_without_triton,
        sources=(CHOICE,),
        source_sha256={"0.32.0": "7b27015e792732e60932813a94470259e979e701b719edcda4e319a4a5da4ca5"},
        install=install_choice,
    ),
    Patch(
        name="model-runner-validation",
        target=VALIDATION,
        what="VllmConfig._validate_v2_model_runner does not ask for Triton if the model is TwoTower.",
        why="The check at the end of the configuration rejects the runner that the first patch made it choose.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        applies_when=runs_on_cpu_without_triton,
        sources=(VALIDATION,),
        source_sha256={"0.32.0": "022544512bec491658f401ac2f959874a57c61d68f4ce643b3fdca1d8f51cb2f"},
        install=install_validation,
    ),
)
