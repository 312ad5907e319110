"""How large a TwoTower is on each GPU: weights, what a pass reads of them, state and KV bytes of a request."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from vllm_twotower.parallel import check_tensor_parallel_size

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig


WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5 + 1 / 16,
    "int4": 0.5 + 2 / 128,
}
"""Bytes of a weight with its scales: one for 16 weights in NVFP4, two for 128 in int4; those of a channel are few."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes on one of ``tensor_parallel_size`` GPUs; both towers have the same.

    ``dense`` is a tower without embeddings, experts and head, of which ``linear_parameters`` can be quantised;
    ``expert`` one routed expert of one layer; ``time`` the denoiser's time conditioning. ``dense_parameters``,
    ``expert_parameters`` and ``head_parameters`` are what is multiplied with a token, 2 FLOPs each; ``time_parameters``
    with a row.
    """

    tensor_parallel_size: int
    dense_bytes: float
    embedding_bytes: float
    head_bytes: float
    expert_bytes: float
    time_bytes: float
    dense_parameters: float
    linear_parameters: float
    head_parameters: float
    expert_parameters: float
    time_parameters: float
    num_moe_layers: int
    num_experts: int
    kv_bytes_per_token: float
    """Keys and values of all attention layers; the denoiser uses the context tower's."""
    state_bytes: float
    """One request's Mamba states: convolution in the model's dtype, SSM in its own."""

    @classmethod
    def of(
        cls,
        config: TwoTowerConfig,
        tensor_parallel_size: int,
        dtype_bytes: float,
        expert_dtype_bytes: float,
        ssm_dtype_bytes: float,
        linear_dtype_bytes: float | None = None,
    ) -> ModelSize:
        """Adds up the tensors of the checkpoint layout; raises ValueError as :func:`check_tensor_parallel_size`.

        The projections of mixers and shared experts have ``linear_dtype_bytes`` a weight, by default ``dtype_bytes``
        as embeddings, head, norms, routers and the KV cache always have.

        Norms, routers and the time conditioning are replicated, KV heads where there are more GPUs than heads; all
        other tensors are divided.
        """
        check_tensor_parallel_size(config, tensor_parallel_size)
        key_value_shards = min(tensor_parallel_size, config.num_key_value_heads)
        parameters = _parameters(config, tensor_parallel_size, key_value_shards)
        dense, linear, embedding, head, experts, time = (
            parameters[part] for part in ("dense", "linear", "embedding", "head", "experts", "time")
        )
        num_moe_layers = config.pattern.count("E")
        expert = experts / (num_moe_layers * config.n_routed_experts) if num_moe_layers else 0.0
        key_value_width = 2 * config.num_key_value_heads * config.head_dim / key_value_shards
        conv = (config.conv_kernel - 1) * _conv_channels(config, tensor_parallel_size) * dtype_bytes
        ssm = config.mamba_intermediate_size * config.ssm_state_size / tensor_parallel_size * ssm_dtype_bytes
        linear_bytes = linear * (dtype_bytes if linear_dtype_bytes is None else linear_dtype_bytes)
        return cls(
            tensor_parallel_size=tensor_parallel_size,
            dense_bytes=(dense - linear) * dtype_bytes + linear_bytes,
            embedding_bytes=embedding * dtype_bytes,
            head_bytes=head * dtype_bytes,
            expert_bytes=expert * expert_dtype_bytes,
            time_bytes=time * dtype_bytes,
            dense_parameters=dense,
            linear_parameters=linear,
            head_parameters=head,
            expert_parameters=expert,
            time_parameters=time,
            num_moe_layers=num_moe_layers,
            num_experts=config.n_routed_experts if num_moe_layers else 0,
            kv_bytes_per_token=config.pattern.count("*") * key_value_width * dtype_bytes,
            state_bytes=config.pattern.count("M") * (conv + ssm),
        )

    @property
    def all_expert_bytes(self) -> float:
        """The routed experts of one tower."""
        return self.num_moe_layers * self.num_experts * self.expert_bytes

    @property
    def weight_bytes(self) -> float:
        """Both towers, both heads and the time conditioning."""
        return 2 * self.tower_bytes + self.time_bytes

    @property
    def tower_bytes(self) -> float:
        """One tower and its head."""
        return self.dense_bytes + self.embedding_bytes + self.head_bytes + self.all_expert_bytes

    def request_bytes(self, context_len: int) -> float:
        """What a request of ``context_len`` tokens holds: one state a Mamba layer and its pages."""
        return self.state_bytes + context_len * self.kv_bytes_per_token


def _parameters(config: TwoTowerConfig, shards: int, key_value_shards: int) -> defaultdict[str, float]:
    """Parameters of one tower on a GPU by part; ``linear`` is a part of ``dense``."""
    from vllm_twotower.architecture import tensor_shapes

    found: defaultdict[str, float] = defaultdict(float)
    for name, shape in tensor_shapes(config).items():
        count = prod(shape)
        if name.startswith(("context_tower.", "context_lm_head.")):
            continue  # the same again
        if name.startswith("lm_head."):
            found["head"] += count / shards
        elif not name.startswith("denoiser_tower."):
            found["time"] += count
        elif ".embeddings." in name:
            found["embedding"] += count / shards
        elif ".experts." in name:
            found["experts"] += count / shards
        elif ".gate." in name or name.endswith(".norm_f.weight") or ".mixer." not in name:
            found["dense"] += count
        else:
            share = count / (key_value_shards if ".k_proj." in name or ".v_proj." in name else shards)
            found["dense"] += share
            found["linear"] += share if name.endswith("_proj.weight") else 0
    return found


def _conv_channels(config: TwoTowerConfig, tensor_parallel_size: int) -> float:
    groups: float = 2 * config.n_groups * config.ssm_state_size
    if config.n_groups > 1:
        groups /= tensor_parallel_size
    return config.mamba_intermediate_size / tensor_parallel_size + groups
