"""A tiny Nemotron-H checkpoint with random weights, saved by transformers."""

from pathlib import Path

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

PATTERN = "M*-EM"


def nemotron_h(**changes) -> NemotronHForCausalLM:
    """The model; ``changes`` go to its configuration."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "use_mamba_kernels": False,
        "torch_dtype": "float32",
        **changes,
    }
    torch.manual_seed(0)
    return NemotronHForCausalLM(NemotronHConfig(hybrid_override_pattern=PATTERN, **settings)).eval()


def save(folder: Path, **changes) -> NemotronHForCausalLM:
    """Saves it in several shards and returns it."""
    model = nemotron_h(**changes)
    model.save_pretrained(folder, max_shard_size="150KB")
    return model
