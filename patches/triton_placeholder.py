"""What vLLM's stand-in for Triton lacks on a CPU."""

from __future__ import annotations

from vllm_twotower.patches._cpu_kernel import UPSTREAM
from vllm_twotower.patches.registry import Patch, locate, runs_on_cpu_without_triton

PLACEHOLDER = "vllm.triton_utils:triton"


def add_next_power_of_2() -> None:
    """The launchers of Model Runner V2 compute block sizes before they look at the kernel."""
    from vllm.utils.math_utils import next_power_of_2

    holder, name = locate(PLACEHOLDER)
    getattr(holder, name).next_power_of_2 = next_power_of_2


PATCHES = (
    Patch(
        name="triton-placeholder-next-power-of-2",
        target=PLACEHOLDER,
        what="Gives the placeholder for the Triton module the function next_power_of_2.",
        why="Without it the launchers of prepare_prefill_inputs and expand_idx_mapping raise AttributeError.",
        upstream=UPSTREAM,
        remove_when="vLLM's TritonPlaceholder has next_power_of_2, or vLLM runs these kernels on a CPU without Triton",
        applies_when=runs_on_cpu_without_triton,
        sources=("vllm.triton_utils.importing:TritonPlaceholder",),
        source_sha256={"0.32.0": "7cfbb1b9e83a361d1662b7e1263c9a3e8bcaafa8692d84950e91f877c982d004"},
        install=add_next_power_of_2,
    ),
)
