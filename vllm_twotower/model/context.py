"""The context tower: vLLM's Nemotron-H with one Mamba state slot a request, and MoE layers that also run on CPUs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.nemotron_h import ALL_DECODER_LAYER_TYPES, NemotronHModel, NemotronHMoE
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from .moe_cpu import CpuMoE


class CommittedMambaMetadataBuilder(Mamba2AttentionMetadataBuilder):
    """Metadata without speculative decoding: the context tower only ever reads committed tokens.

    vLLM counts a canvas as draft tokens and would give each of them a state slot of its own.
    """

    def __init__(self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.num_spec_tokens = 0
        self.use_spec_decode = False
        self.supports_update_block_table = True
        self.reorder_batch_threshold = 1
        self.state_indices_tensor_d = self.state_indices_tensor_d[:, :1].contiguous()


class CommittedMambaBackend(Mamba2AttentionBackend):
    """Mamba-2 backend with :class:`CommittedMambaMetadataBuilder`."""

    @staticmethod
    def get_builder_cls() -> type[CommittedMambaMetadataBuilder]:
        return CommittedMambaMetadataBuilder


class ContextMambaMixer(MambaMixer2):
    """Mamba-2 mixer whose cache holds the states after a row's last token, ``conv_kernel - 1`` wide.

    It keeps no states from inside a chunk, so vLLM ends prompt chunks at the borders where states are cached.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_spec = 0

    def get_attn_backend(self) -> type[CommittedMambaBackend]:
        return CommittedMambaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return replace(
            super().get_kv_cache_spec(vllm_config),
            num_speculative_blocks=0,
            num_prefill_checkpoint_blocks=0,
            prefill_checkpoint_alignment=None,
        )


def mamba_mixer(
    mixer_class: type[MambaMixer2],
    config: PretrainedConfig,
    model_config: ModelConfig | None,
    cache_config: CacheConfig | None,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> MambaMixer2:
    """A Mamba-2 mixer of the given class with Nemotron-H's dimensions."""
    return mixer_class(
        hidden_size=config.hidden_size,
        ssm_state_size=config.ssm_state_size,
        conv_kernel_size=config.conv_kernel,
        intermediate_size=config.mamba_num_heads * config.mamba_head_dim,
        use_conv_bias=config.use_conv_bias,
        use_bias=config.use_bias,
        n_groups=config.n_groups,
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        rms_norm_eps=config.layer_norm_epsilon,
        activation=config.mamba_hidden_act,
        model_config=model_config,
        cache_config=cache_config,
        quant_config=quant_config,
        prefix=prefix,
    )


def moe_mixer(
    config: PretrainedConfig, quant_config: QuantizationConfig | None, parallel_config: ParallelConfig, prefix: str
) -> nn.Module:
    """vLLM's fused MoE, or on CPUs, where that knows no relu² experts, our own."""
    moe_class = CpuMoE if current_platform.is_cpu() else NemotronHMoE
    return moe_class(config, quant_config=quant_config, parallel_config=parallel_config, prefix=prefix)


class _PreNormLayer(nn.Module):
    """Residual layer in vLLM's form: the addition is fused into the next layer's norm."""

    def __init__(self, config: PretrainedConfig, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states and residual (T, H) -> the mixer's output and the new residual."""
        if residual is None:
            residual, hidden_states = hidden_states, self.norm(hidden_states)
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states), residual


class ContextMambaLayer(_PreNormLayer):
    """A Mamba layer of the context tower; the arguments are those :class:`NemotronHModel` gives its layers."""

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        mixer = mamba_mixer(
            ContextMambaMixer, config, model_config, cache_config, quant_config, prefix=f"{prefix}.mixer"
        )
        super().__init__(config, mixer)


class ContextMoELayer(_PreNormLayer):
    """A MoE layer of the context tower; the arguments are those :class:`NemotronHModel` gives its layers."""

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        super().__init__(config, moe_mixer(config, quant_config, parallel_config, prefix=f"{prefix}.mixer"))


def context_tower(vllm_config: VllmConfig, prefix: str) -> NemotronHModel:
    """The causal tower over all committed tokens, with paged attention and paged Mamba states."""
    layer_types = {**ALL_DECODER_LAYER_TYPES, "M": ContextMambaLayer, "E": ContextMoELayer}
    return NemotronHModel(vllm_config=vllm_config, prefix=prefix, decoder_layer_types=layer_types)
