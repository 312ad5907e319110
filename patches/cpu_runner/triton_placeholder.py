"""What vLLM's stand-in for Triton lacks on a CPU."""

from typing import Any


def with_next_power_of_2(placeholder: Any) -> Any:
    """The launchers of Model Runner V2 compute block sizes before they look at the kernel."""
    from vllm.utils.math_utils import next_power_of_2

    placeholder.next_power_of_2 = next_power_of_2
    return placeholder
