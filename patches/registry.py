"""The record of one patch, and the two moments at which patches are installed."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Modules of this package, each with a tuple PATCHES. The start modules must import neither torch nor vLLM at the top.
START_MODULES = (
    "model_runner_choice",
    "sampling_params",
    "structured_outputs",
    "diffusion_metrics",
    "shared_memory_names",
    "beam_search",
    "open_requests",
    "request_errors",
)
WORKER_MODULES = (
    "shared_memory_names_ranks",
    "triton_placeholder",
    "cpu_staged_writes",
    "cpu_input_batch",
    "cpu_block_tables",
    "cpu_kv_zeroing",
    "cpu_logprobs",
    "embedding_mask",
    "grammar_bitmask",
)

TWO_TOWER_ARCHITECTURE = "NemotronHTwoTowerForCausalLM"

_installed: set[str] = set()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of vLLM.

    Attributes:
        name: short unique name.
        target: the replaced attribute, as "module:attribute.path".
        what: what the replacement does.
        why: what goes wrong without it.
        upstream: issue or pull request, or "not reported".
        remove_when: the condition under which the patch can be deleted.
        applies_when: whether this process needs the patch; its docstring says when.
        sources: the upstream definitions ("module:qualified.name") whose behaviour the replacement relies on.
        source_sha256: vLLM release -> digest of the sources' text at which the patch was checked; see test_patches.py.
        install: replaces the target.
    """

    name: str
    target: str
    what: str
    why: str
    upstream: str
    remove_when: str
    applies_when: Callable[[], bool]
    sources: tuple[str, ...]
    source_sha256: Mapping[str, str]
    install: Callable[[], None]


def install_start_patches() -> None:
    """Install what every vLLM process needs from the start. Cheap, and a second call does nothing."""
    _install(START_MODULES)


def install_worker_patches() -> None:
    """Install what a worker needs before its first step. A second call does nothing."""
    _install(WORKER_MODULES)


def all_patches() -> tuple[Patch, ...]:
    """Every registered patch, whether it applies here or not."""
    return tuple(patch for name in START_MODULES + WORKER_MODULES for patch in load_patches(name))


def load_patches(module_name: str) -> tuple[Patch, ...]:
    """The patches which one module of this package registers."""
    return importlib.import_module(f"{__package__}.{module_name}").PATCHES


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


def replace(target: str, replacement: Any) -> None:
    """Set the attribute named by "module:attribute.path"."""
    holder, attribute = locate(target)
    setattr(holder, attribute, replacement)


def call_after(target: str, after: Callable[[Any], None]) -> None:
    """Have ``after`` called with the object whenever the method named by "module:attribute.path" has returned."""
    holder, name = locate(target)
    upstream = getattr(holder, name)

    @functools.wraps(upstream)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = upstream(self, *args, **kwargs)
        after(self)
        return result

    replace(target, method)


def runs_on_cpu_without_triton() -> bool:
    """On vLLM's CPU platform without a Triton that can compile for it."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def runs_on_cpu() -> bool:
    """On vLLM's CPU platform."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def everywhere() -> bool:
    """In every process, on every platform."""
    return True


def serves_two_tower(model_config: Any) -> bool:
    """Whether a vLLM ModelConfig (or None) is for the TwoTower model."""
    return model_config is not None and TWO_TOWER_ARCHITECTURE in (model_config.architectures or ())


def _install(module_names: tuple[str, ...]) -> None:
    for module_name in module_names:
        for patch in load_patches(module_name):
            if patch.name not in _installed:
                install_if_needed(patch)
                _installed.add(patch.name)


def install_if_needed(patch: Patch) -> None:
    """Install one patch if it applies here; a RuntimeError says which one does not fit the installed vLLM."""
    try:
        if patch.applies_when():
            locate(patch.target)
            patch.install()
    except MissingTargetError as error:
        raise RuntimeError(f"vllm-twotower's patch '{patch.name}' does not fit this vLLM: {error}.") from error
