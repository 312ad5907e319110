"""Nemotron-H's mixture of experts on CPUs: vLLM's CPU kernels know gated experts only (fused_moe/config.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import ParallelConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.utils import divide
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.nemotron_h import NemotronHMLP
from vllm.model_executor.utils import set_weight_attrs

from vllm_twotower.quantization import quantization_of

from .quantized_cpu import quantized_projection


class _Projection(nn.Module):
    """This rank's slice of one matrix (out, in) of an expert, cut along ``shard_dim``, so that it loads by name."""

    def __init__(self, shape: tuple[int, int], shard_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load})
        self._shard_dim = shard_dim

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return F.linear(x, self.weight)

    def _load(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        size = parameter.shape[self._shard_dim]
        parameter.data.copy_(loaded.narrow(self._shard_dim, get_tensor_model_parallel_rank() * size, size))


class _Expert(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up_proj, self.down_proj = up, down


class CpuMoE(nn.Module):
    """Routed relu² experts plus a shared one; the router works in fp64 as NVIDIA's code does.

    Experts are split over tensor-parallel ranks along their intermediate dimension. Quantised ones stay so: no weights
    are made of all of them.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None,
        parallel_config: ParallelConfig,
        prefix: str,
    ):
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        width = divide(config.moe_intermediate_size, self.tp_size)
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.gate: Any = nn.Module()
        self.gate.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size), requires_grad=False)
        self.gate.e_score_correction_bias = nn.Parameter(
            torch.empty(self.num_experts, dtype=torch.float32), requires_grad=False
        )
        quantization = quantization_of(getattr(config, "quantization_config", None))

        def projection(name: str, shape: tuple[int, int], shard_dim: int) -> nn.Module:
            kept = quantized_projection(quantization, f"{prefix}.experts.{name}", shape, shard_dim, self.tp_size)
            return _Projection(shape, shard_dim) if kept is None else kept

        experts = (
            _Expert(
                projection(f"{i}.up_proj", (width, config.hidden_size), 0),
                projection(f"{i}.down_proj", (config.hidden_size, width), 1),
            )
            for i in range(self.num_experts)
        )
        self.experts = cast(Iterable[_Expert], nn.ModuleList(experts))
        self.shared_experts = NemotronHMLP(
            config,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_shared_expert_intermediate_size * config.n_shared_experts,
            reduce_results=False,
            prefix=f"{prefix}.shared_experts",
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, H) -> chosen experts (T, k) and their weights (T, k) in fp64.

        The correction bias takes part in the choice only.
        """
        scores = torch.sigmoid(F.linear(x.double(), self.gate.weight.double()))
        experts = torch.topk(scores + self.gate.e_score_correction_bias.double(), self.top_k, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, H) -> (T, H): tokens are sorted by expert, so that each expert used runs once."""
        experts, weights = self.route(hidden_states)
        order = experts.flatten().argsort(stable=True)
        rows = order // self.top_k
        gathered, factors = hidden_states[rows], weights.flatten()[order].to(hidden_states.dtype)
        counts = experts.flatten().bincount(minlength=self.num_experts).tolist()
        outputs = [
            expert.down_proj(F.relu(expert.up_proj(part)).square_())
            for expert, part in zip(self.experts, gathered.split(counts), strict=True)
            if len(part)
        ]
        out = self.shared_experts(hidden_states)
        out.index_add_(0, rows, torch.cat(outputs) * factors[:, None])
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out
