"""Over how many ranks a model can be divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""What plans and inspections show."""
_LARGEST = 64
_VOCAB_PADDING = 64  # vLLM's VocabParallelEmbedding


def check_tensor_parallel_size(config: TwoTowerConfig, size: int) -> None:
    """Raises ValueError if the heads, groups or widths of the model cannot be divided over ``size`` ranks.

    The error names the dimension, its value and the sizes that fit. The rules are vLLM's: KV heads may be replicated,
    one Mamba group may be, the vocabulary is padded.
    """
    if obstacle := tensor_parallel_obstacle(config, size):
        fitting = [str(n) for n in range(1, _LARGEST + 1) if not tensor_parallel_obstacle(config, n)]
        raise ValueError(f"{obstacle}; sizes that fit: {', '.join(fitting)}")


def tensor_parallel_obstacle(config: TwoTowerConfig, size: int) -> str | None:
    """The first dimension that cannot be divided over ``size`` ranks, in words; None if all can."""
    dimensions = []
    if "*" in config.pattern:
        dimensions += ["num_attention_heads"]
        key_value_heads = config.num_key_value_heads
        if key_value_heads % size and size % key_value_heads:
            return f"{size} and num_key_value_heads ({key_value_heads}): one must divide the other"
    if "M" in config.pattern:
        dimensions += ["mamba_num_heads"] + (["n_groups"] if config.n_groups > 1 else [])
    if "E" in config.pattern:
        dimensions += ["moe_intermediate_size", "moe_shared_expert_intermediate_size"]
    if "-" in config.pattern:
        dimensions += ["intermediate_size"]
    for name in dimensions:
        if getattr(config, name) % size:
            return f"{size} does not divide {name} ({getattr(config, name)})"
    padded = -(-config.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    return f"{size} does not divide vocab_size ({config.vocab_size}), padded to {padded}" if padded % size else None
