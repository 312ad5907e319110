"""Which of vLLM's kernels the matrices of the released model get on GPUs that are not there; run as a script.

python tests/fake_experts.py CHECKPOINT

Prints two JSON lists of rows, all by vLLM's own selection. Of the checkpoints that ``vllm-twotower quantize`` writes:
compute capability, scheme, the experts' kernel, the scheme of other matrices. Of vLLM's options that quantise while a
checkpoint is loaded: compute capability, option, the experts' kernel or the error, whether they are for other matrices.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from fake_cuda import DeviceCapability, Gpu, configured
from vllm.config import set_current_vllm_config
from vllm.config.quantization import _ONLINE_SHORTHANDS
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from vllm_twotower.planning.released import RELEASED_CONFIG
from vllm_twotower.quantize import SCHEMES, Recipe

ONLINE = ("fp8_per_channel", "fp8_per_tensor", "int8_per_channel_weight_only", "nvfp4_per_token")
MIXER = "context_tower.layers.1.mixer"


def experts() -> FusedMoEConfig:
    """The released model's."""
    c = RELEASED_CONFIG
    return FusedMoEConfig(
        num_experts=c["n_routed_experts"],
        experts_per_token=c["num_experts_per_tok"],
        hidden_dim=c["hidden_size"],
        intermediate_size=c["moe_intermediate_size"],
        num_local_experts=c["n_routed_experts"],
        num_logical_experts=c["n_routed_experts"],
        activation=MoEActivation.RELU2_NO_MUL,
        device="cuda",
        routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        router_logits_dtype=torch.float32,
    )


def kernel_of_experts(scheme: str | None) -> str:
    """The class of vLLM's kernel."""
    if scheme is None:
        return select_unquantized_moe_backend(experts())[1].__name__
    projections = {"ckpt_gate_proj_name": "up_proj", "ckpt_down_proj_name": "down_proj", "ckpt_up_proj_name": None}
    layer = SimpleNamespace(moe_config=experts(), **projections)
    config = CompressedTensorsConfig.from_config(Recipe(experts=scheme).config().model_dump())
    return CompressedTensorsMoEMethod.get_moe_method(config, layer, f"{MIXER}.experts").experts_cls.__name__


def scheme_of_matrices(scheme: str | None) -> str | None:
    """The class of vLLM's scheme, the same for all of them."""
    if scheme is None:
        return None
    config = CompressedTensorsConfig.from_config(Recipe(dense=scheme).config().model_dump())
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = ("qkv_proj", "o_proj", "in_proj", "out_proj", "shared_experts.up_proj")
    linear = torch.nn.Linear(1, 1, device="meta")
    (found,) = {type(config.get_scheme(linear, f"{MIXER}.{name}")).__name__ for name in names}
    return found


def quantised_online(option: str) -> list:
    """The kernel of the experts or the error, and whether other matrices are quantised."""
    config = OnlineQuantizationConfig(_ONLINE_SHORTHANDS[option])
    others = config.resolve_quant_method_cls(LinearBase, f"{MIXER}.in_proj") is not None
    *_, method = config.resolve_quant_method_cls(RoutedExperts, f"{MIXER}.experts")
    try:
        return [method(moe=experts()).experts_cls.__name__, others]
    except ValueError as error:
        return [str(error), others]


if __name__ == "__main__":
    written, online = [], []
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)):
        Gpu.capability = DeviceCapability(*capability)
        with set_current_vllm_config(configured(sys.argv[1])):
            for scheme in (None, *SCHEMES):
                written.append([*capability, scheme, kernel_of_experts(scheme), scheme_of_matrices(scheme)])
            online += [[*capability, option, *quantised_online(option)] for option in ONLINE]
    print(json.dumps([written, online]))
