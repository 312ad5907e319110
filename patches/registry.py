"""The record of one patch, when it applies, and how it is installed."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_twotower.architecture import ARCHITECTURE


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of vLLM.

    Attributes:
        name: short unique name.
        target: the replaced attribute, as "module:attribute.path".
        function: what replaces it, as "module:name" within this package.
        wraps: whether the function is called with what it replaces, and returns the replacement.
        what: what the replacement does.
        why: what goes wrong without it.
        upstream: issue or pull request, or "not reported".
        remove_when: the condition under which the patch can be deleted.
        applies_when: whether this process needs the patch; its docstring says when.
        sources: the upstream definitions ("module:qualified.name") whose behaviour the replacement relies on.
        source_sha256: vLLM release -> digest of the sources' text at which the patch was checked; see test_patches.py.
    """

    name: str
    target: str
    function: str
    wraps: bool
    what: str
    why: str
    upstream: str
    remove_when: str
    applies_when: Callable[[], bool]
    sources: tuple[str, ...]
    source_sha256: Mapping[str, str]

    def install(self) -> None:
        """Replaces the target if the patch applies here; raises RuntimeError if it does not fit the installed vLLM."""
        try:
            if self.applies_when():
                holder, attribute = locate(self.target)
                module, _, name = self.function.partition(":")
                function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
                if self.wraps:
                    function = function(inspect.getattr_static(holder, attribute))
                setattr(holder, attribute, function)
        except MissingTargetError as error:
            raise RuntimeError(f"vllm-twotower's patch '{self.name}' does not fit this vLLM: {error}.") from error


class MissingTargetError(RuntimeError):
    """The installed vLLM does not have an attribute that a patch replaces."""


def locate(target: str) -> tuple[Any, str]:
    """Split "module:attribute.path" into the object that holds the attribute and the attribute's name."""
    module_name, _, path = target.partition(":")
    *holders, attribute = path.split(".")
    try:
        holder = importlib.import_module(module_name)
        for name in holders:
            holder = getattr(holder, name)
        getattr(holder, attribute)
    except (ImportError, AttributeError) as error:
        from vllm.version import __version__ as vllm_version

        raise MissingTargetError(f"vLLM {vllm_version} has no {target}") from error
    return holder, attribute


def followed_by(upstream: Callable, after: Callable[[Any], None]) -> Callable:
    """The method ``upstream``, and ``after`` called with the object when it has returned."""

    @functools.wraps(upstream)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = upstream(self, *args, **kwargs)
        after(self)
        return result

    return method


def runs_on_cpu_without_triton() -> bool:
    """On vLLM's CPU platform without a Triton that can compile for it."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def configuration_asks_for_triton() -> bool:
    """On a CPU without Triton, before vLLM 0.33."""
    return runs_on_cpu_without_triton() and not _has_release("0.33")


def worker_asks_for_triton() -> bool:
    """On a CPU without Triton, since vLLM 0.33."""
    return runs_on_cpu_without_triton() and _has_release("0.33")


def _has_release(release: str) -> bool:
    from packaging.version import Version
    from vllm.version import __version__ as vllm_version

    return Version(vllm_version) >= Version(release)


def runs_on_cpu() -> bool:
    """On vLLM's CPU platform."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def kernel_cannot_launch(target: str) -> Callable[[], bool]:
    """The condition for replacing the Triton kernel at ``target``, or a method that launches it."""

    def kernel_cannot_launch() -> bool:
        """On a CPU without Triton, where vLLM has no fallback of its own for the kernel."""
        if not runs_on_cpu_without_triton():
            return False
        from vllm_twotower.patches.cpu_runner.kernel import CpuKernel

        holder, name = locate(target)
        kernel = getattr(holder, name)
        return isinstance(kernel, CpuKernel) or not hasattr(kernel, "__getitem__")

    return kernel_cannot_launch


def in_one_of_several_ranks() -> bool:
    """In a process that is one rank of several, and so serves nothing else."""
    from vllm.distributed import get_tp_group, model_parallel_is_initialized

    return model_parallel_is_initialized() and get_tp_group().world_size > 1


def everywhere() -> bool:
    """In every process, on every platform."""
    return True


def serves_two_tower(model_config: Any) -> bool:
    """Whether a vLLM ModelConfig (or None) is for the TwoTower model."""
    return model_config is not None and ARCHITECTURE in (model_config.architectures or ())
