"""What the torch replacements of vLLM's Triton kernels share."""

from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import locate, replace, runs_on_cpu_without_triton

# vLLM's own plan for the same thing.
UPSTREAM = "https://github.com/vllm-project/vllm/pull/55847"
REMOVE_WHEN = "vLLM runs this kernel on a CPU without Triton"


class TorchKernel:
    """Stands in for a Triton kernel: ``kernel[grid](...)`` calls a torch function with the same parameters.

    The function works on whole tensors, so it needs neither the grid nor launch options such as BLOCK_SIZE.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.function


def kernel_installer(target: str, function: Callable[..., None]) -> Callable[[], None]:
    """An install function that puts a torch kernel in place of the kernel object at `target`."""
    return lambda: replace(target, TorchKernel(function))


def when_kernel_cannot_launch(target: str) -> Callable[[], bool]:
    """A condition: on a CPU without Triton, unless vLLM has put a fallback of its own at the kernel `target`."""

    def kernel_cannot_launch() -> bool:
        """On a CPU without Triton, where vLLM has no fallback of its own for the kernel."""
        if not runs_on_cpu_without_triton():
            return False
        holder, name = locate(target)
        kernel = getattr(holder, name)
        return isinstance(kernel, TorchKernel) or not hasattr(kernel, "__getitem__")

    return kernel_cannot_launch
