"""The context tower: vLLM's Nemotron-H with one Mamba state slot a request, and MoE layers that also run on CPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2, Mixer2RMSNormGated
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.layernorm_gated import rms_norm_gated
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.nemotron_h import ALL_DECODER_LAYER_TYPES, NemotronHModel, NemotronHMoE
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from vllm_twotower.kernels import commit_states, seeded_conv, seeded_scan

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
        self.state_indices_tensor_d: Tensor = self.state_indices_tensor_d[:, :1].contiguous()


class CommittedMambaBackend(Mamba2AttentionBackend):
    """Mamba-2 backend with :class:`CommittedMambaMetadataBuilder`."""

    @staticmethod
    def get_builder_cls() -> type[CommittedMambaMetadataBuilder]:
        return CommittedMambaMetadataBuilder


@dataclass
class Scanned:
    """What a scan from given states ran on, for R rows of S tokens: enough to write the state after any of them.

    ``xbc`` (R, S, C) are the inputs of the convolution and ``dt`` (R, S, n) the time steps, as the input projection
    gives them; ``x`` (R, S, n, p) and ``b`` (R, S, g, s) are fp32.
    """

    xbc: Tensor
    x: Tensor
    dt: Tensor
    b: Tensor


def cached_states(mixer: MambaMixer2) -> tuple[Tensor, Tensor]:
    """A context layer's states: convolution inputs (N, k - 1, C) and SSM states (N, n, p, s)."""
    conv_cache, ssm_cache = mixer.kv_cache
    return (conv_cache.transpose(1, 2) if is_conv_state_dim_first() else conv_cache), ssm_cache


def blank_states(mixer: MambaMixer2, num_rows: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """As :func:`cached_states`, before there are any, and the indices (R,) of rows in it: for profiling memory."""
    like = mixer.conv1d.weight
    conv = like.new_zeros(1, mixer.conv_kernel_size - 1, mixer.tped_conv_size)
    ssm = like.new_zeros(1, mixer.tped_dt_size, mixer.head_dim, mixer.ssm_state_size)
    return (conv, ssm), like.new_zeros(num_rows, dtype=torch.int64)


def mix_from(
    mixer: MambaMixer2,
    projected: Tensor,
    states: tuple[Tensor, Tensor],
    indices: Tensor,
    output: Tensor,
    lengths: Tensor | None = None,
) -> Scanned:
    """Convolution and scan of R rows of S tokens from their states into ``output`` (R * S, n * p); what it ran on.

    ``projected`` (R, S, C + n) are convolution inputs and time steps as the input projection gives them; ``states`` as
    of :func:`cached_states`, those of the rows at ``indices`` (R,). What lies behind the ``lengths`` (R,) of rows, if
    there are any, need not be finite.
    """
    xbc, dt = projected.split([mixer.tped_conv_size, mixer.tped_dt_size], dim=-1)
    conv_states, ssm_states = states
    mixed = seeded_conv(xbc, conv_states, indices, mixer.conv_weights, mixer.conv1d.bias)
    x, b, c = mixer.split_hidden_states_B_C_fn(mixed)
    groups = (mixer.n_groups // mixer.tp_size, mixer.ssm_state_size)
    x, b, c = x.unflatten(-1, (-1, mixer.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)
    seeded_scan(x, dt, mixer.dt_bias, mixer.A, b, c, mixer.D, ssm_states, indices, output.view(x.shape), lengths)
    return Scanned(xbc, x, dt, b)


@dataclass
class UncommittedRead:
    """In the place of a Mamba layer's metadata: its R rows of equal width may be rejected from some token on.

    The layer starts from its states at ``state_indices`` (R,), leaves them as they are, and fills ``scanned``. What
    lies behind the ``lengths`` (R,) of rows, if some are shorter, need not be finite.
    """

    num_rows: int
    state_indices: Tensor
    lengths: Tensor | None = None
    scanned: Scanned | None = None


class ContextMambaMixer(MambaMixer2):
    """Mamba-2 mixer whose cache holds the states after a row's last token, ``conv_kernel - 1`` wide.

    It keeps no states from inside a chunk, so vLLM ends prompt chunks at the borders where states are cached.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_spec = 0

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> Tensor | None:
        """vLLM's, but for tokens that may be rejected; (T, D) -> ``output`` (T, n * p)."""
        metadata = get_forward_context().attn_metadata
        read = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if not isinstance(read, UncommittedRead):
            return super().conv_ssm_forward(projected_states, output)
        by_row = projected_states[:, self.tped_intermediate_size :].unflatten(0, (read.num_rows, -1))
        read.scanned = mix_from(self, by_row, cached_states(self), read.state_indices, output, read.lengths)
        return None

    def blank_read(self, num_rows: int, width: int) -> Scanned:
        """What a read of so many rows that may be rejected keeps; for profiling memory."""
        like = self.conv1d.weight
        size = self.tped_intermediate_size + self.tped_conv_size + self.tped_dt_size
        projected = like.new_zeros(num_rows, width, size)[..., self.tped_intermediate_size :]
        output = like.new_empty(num_rows * width, self.tped_intermediate_size)
        return mix_from(self, projected, *blank_states(self, num_rows), output)

    def commit(self, read: UncommittedRead, counts: Tensor) -> None:
        """Writes the states after the first ``counts`` (R,) tokens of the rows that it has read."""
        kept, states = read.scanned, cached_states(self)
        assert kept is not None
        commit_states(kept.xbc, kept.x, kept.dt, self.dt_bias, self.A, kept.b, counts, *states, read.state_indices)

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
    mixer = mixer_class(
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
    mixer.norm = GatedNorm(mixer.intermediate_size, config.n_groups, eps=config.layer_norm_epsilon)
    return mixer


class GatedNorm(Mixer2RMSNormGated):
    """vLLM's, which on GPUs falls back to separate operations of torch for several groups: one kernel knows them."""

    def forward_cuda(self, x: Tensor, gate: Tensor) -> Tensor:
        """(T, D) each, D the channels of this rank -> (T, D)."""
        if self.n_groups == 1 or self.n_groups % self.tp_size:
            return super().forward_cuda(x, gate)
        return rms_norm_gated(
            x,
            self.weight.data,
            bias=None,
            z=gate,
            eps=self.variance_epsilon,
            group_size=self.group_size,
            norm_before_gate=False,
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
        return self.mix(hidden_states), residual

    def mix(self, normed: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return self.mixer(normed)


class ContextMambaLayer(_PreNormLayer):
    """A Mamba layer of the context tower; the arguments are those :class:`NemotronHModel` gives its layers."""

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        mixer = mamba_mixer(
            ContextMambaMixer, config, model_config, cache_config, quant_config, prefix=f"{prefix}.mixer"
        )
        super().__init__(config, mixer)


class ContextMoELayer(_PreNormLayer):
    """A MoE layer of the context tower; the arguments are those :class:`NemotronHModel` gives its layers.

    Inert tokens go to the experts of the first token, so that no expert's weights are read for them.
    """

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        super().__init__(config, moe_mixer(config, quant_config, parallel_config, prefix=f"{prefix}.mixer"))

    def mix(self, normed: Tensor) -> Tensor:
        is_padding = get_forward_context().is_padding
        if is_padding is not None:
            normed = torch.where(is_padding[:, None], normed[:1], normed)
        return self.mixer(normed)


def context_tower(vllm_config: VllmConfig, prefix: str) -> NemotronHModel:
    """The causal tower over all committed tokens, with paged attention and paged Mamba states."""
    layer_types = {**ALL_DECODER_LAYER_TYPES, "M": ContextMambaLayer, "E": ContextMoELayer}
    return NemotronHModel(vllm_config=vllm_config, prefix=prefix, decoder_layer_types=layer_types)
