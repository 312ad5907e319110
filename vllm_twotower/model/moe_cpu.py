"""Nemotron-H's mixture of experts on CPUs: vLLM's CPU kernels know gated experts only (fused_moe/config.py)."""

from __future__ import annotations

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


class _Expert(nn.Module):
    """This rank's slice of one expert, as two rows of the stacked weights, so that checkpoints load by name."""

    def __init__(self, up: Tensor, down: Tensor):
        super().__init__()
        self.up_proj, self.down_proj = nn.Module(), nn.Module()
        for projection, weight, shard_dim in ((self.up_proj, up, 0), (self.down_proj, down, 1)):
            projection.weight = nn.Parameter(weight, requires_grad=False)
            set_weight_attrs(projection.weight, {"weight_loader": _shard_loader(shard_dim)})


def _shard_loader(dim: int):
    """Copies this rank's part of a full tensor, cut along ``dim``."""

    def load(parameter: nn.Parameter, loaded: Tensor) -> None:
        size = parameter.shape[dim]
        parameter.data.copy_(loaded.narrow(dim, get_tensor_model_parallel_rank() * size, size))

    return load


class CpuMoE(nn.Module):
    """Routed relu² experts plus a shared one; the router works in fp64 as NVIDIA's code does.

    Experts are split over tensor-parallel ranks along their intermediate dimension. Quantised experts are refused.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None,
        parallel_config: ParallelConfig,
        prefix: str,
    ):
        super().__init__()
        if quant_config is not None:
            raise ValueError("quantization is not supported for the MoE layers of TwoTower models on CPUs")
        self.tp_size = get_tensor_model_parallel_world_size()
        width = divide(config.moe_intermediate_size, self.tp_size)
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.gate = nn.Module()
        self.gate.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size), requires_grad=False)
        self.gate.e_score_correction_bias = nn.Parameter(
            torch.empty(self.num_experts, dtype=torch.float32), requires_grad=False
        )
        self.experts = nn.ModuleList(
            _Expert(torch.empty(width, config.hidden_size), torch.empty(config.hidden_size, width))
            for _ in range(self.num_experts)
        )
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
            F.linear(F.relu(F.linear(part, expert.up_proj.weight)).square_(), expert.down_proj.weight)
            for expert, part in zip(self.experts, gathered.split(counts), strict=True)
            if len(part)
        ]
        out = self.shared_experts(hidden_states)
        out.index_add_(0, rows, torch.cat(outputs) * factors[:, None])
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out
