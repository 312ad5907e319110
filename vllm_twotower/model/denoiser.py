"""The denoiser tower: Nemotron-H over canvases, reading the context tower's pages and states.

Attention writes the canvas's keys and values into the context layer's own pages, at the slots of the positions the
canvas stands for, and then attends without a causal mask to [context | canvas]; the context tower overwrites these
scratch entries when it commits the block. Mamba layers read the context layer's state and write nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.nemotron_h import NemotronHAttention, NemotronHMLP, NemotronHModel
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend

from vllm_twotower.kernels import gated_residual_norm
from vllm_twotower.options import ATTENTION_BACKENDS, ATTENTION_REASON

from .context import blank_states, cached_states, mamba_mixer, mix_from, moe_mixer

CONTEXT_PREFIX, DENOISER_PREFIX = "context_tower", "denoiser_tower"


@dataclass
class CanvasRows:
    """How canvas tokens lie in R rows of ``width`` (S) each, T = R * S.

    ``state_indices`` maps a context Mamba layer's name to the slots (R,) of its states; it is empty when memory is
    profiled, before there are any.
    """

    num_rows: int
    width: int
    state_indices: Mapping[str, Tensor] = field(default_factory=dict)

    def by_row(self, x: Tensor) -> Tensor:
        """(T, D) -> (R, S, D)."""
        return x.view(self.num_rows, self.width, -1)


def _context_name(layer_name: str) -> str:
    return layer_name.replace(DENOISER_PREFIX, CONTEXT_PREFIX, 1)


def _own_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The same backend under another name, so that the denoiser gets a metadata builder of its own.

    Layers that share a backend share its builder, whose persistent buffers would be overwritten by the other tower.
    Raises ValueError for a backend that is not known to write the canvas's keys and values.
    """
    if backend.get_name() not in ATTENTION_BACKENDS:
        raise ValueError(
            f"the attention backend {backend.get_name()} is not supported for TwoTower models: {ATTENTION_REASON}"
        )
    return subclass_attention_backend("Denoiser", backend, backend.get_builder_cls())


class DenoiserAttention(NemotronHAttention):
    """Attention over [context | canvas], keys and values of both in the context layer's pages."""

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, prefix):
        super().__init__(config, layer_idx, model_config, cache_config, quant_config, prefix)
        name = self.attn.layer_name
        del get_current_vllm_config().compilation_config.static_forward_context[name]
        self.attn: Attention = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=name,
            kv_sharing_target_layer_name=_context_name(name),
            attn_backend=_own_backend(self.attn.attn_backend),
        )

    def forward(self, hidden_states: Tensor, rows: CanvasRows) -> Tensor:
        """(T, H) -> (T, H)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        # vLLM writes no keys and values for a layer that shares another one's pages.
        torch.ops.vllm.unified_kv_cache_update(
            k.reshape(-1, self.num_kv_heads, self.head_dim),
            v.reshape(-1, self.num_kv_heads, self.head_dim),
            _encode_layer_name(self.attn.layer_name),
        )
        return self.o_proj(self.attn(q, k, v))[0]


class DenoiserMambaMixer(MambaMixer2):
    """The mixer's weights without a cache of its own: seeded with the context layer's state, scan in fp32."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del get_current_vllm_config().compilation_config.static_forward_context[self.prefix]

    def forward(self, hidden_states: Tensor, rows: CanvasRows) -> Tensor:
        """(T, H) -> (T, H)."""
        projected, _ = self.in_proj(hidden_states)
        gate, of_mixer = projected.split([self.tped_intermediate_size, self.tped_conv_size + self.tped_dt_size], dim=-1)
        name = _context_name(self.prefix)
        if name in rows.state_indices:
            states = cached_states(get_forward_context().no_compile_layers[name]), rows.state_indices[name]
        else:
            states = blank_states(self, rows.num_rows)
        y = torch.empty_like(gate)
        mix_from(self, rows.by_row(of_mixer), *states, y)
        return self.out_proj(self.norm(y, gate))[0]


class _DenoiserLayer(nn.Module):
    """``x + gate * mixer(modulated norm of x)``; mixers that mix positions are modulated before the norm.

    The addition is left to the next layer, where one kernel does it with the norm.
    """

    mixes_positions = False
    has_experts = False

    def __init__(self, config, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, x: Tensor, mixed: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: CanvasRows
    ) -> tuple[Tensor, Tensor]:
        """x (T, H) and what the layer before has mixed -> both of this one.

        ``shift`` and ``scale`` (1 + the learned one) (R, H) are this layer's, ``gate`` (R, H) is that before.
        """
        # So that no expert's weights are read for inert tokens.
        is_padding = get_forward_context().is_padding if self.has_experts else None
        norm, before = (self.norm.weight, self.norm.variance_epsilon), not self.mixes_positions
        x, y = gated_residual_norm(x, mixed, gate, shift, scale, *norm, before, is_padding)
        return x, self.mixer(y, rows) if self.mixes_positions else self.mixer(y)


class DenoiserMambaLayer(_DenoiserLayer):
    """The arguments are those :class:`NemotronHModel` gives its layers."""

    mixes_positions = True

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        mixer = mamba_mixer(
            DenoiserMambaMixer, config, model_config, cache_config, quant_config, prefix=f"{prefix}.mixer"
        )
        super().__init__(config, mixer)


class DenoiserAttentionLayer(_DenoiserLayer):
    """The arguments are those :class:`NemotronHModel` gives its layers."""

    mixes_positions = True

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        mixer = DenoiserAttention(config, layer_idx, model_config, cache_config, quant_config, prefix=f"{prefix}.mixer")
        super().__init__(config, mixer)


class DenoiserMLPLayer(_DenoiserLayer):
    """The arguments are those :class:`NemotronHModel` gives its layers."""

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        mixer = NemotronHMLP(
            config,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            quant_config=quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mixer",
        )
        super().__init__(config, mixer)


class DenoiserMoELayer(_DenoiserLayer):
    """The arguments are those :class:`NemotronHModel` gives its layers."""

    has_experts = True

    def __init__(self, config, layer_idx, model_config, cache_config, quant_config, parallel_config, prefix):
        super().__init__(config, moe_mixer(config, quant_config, parallel_config, prefix=f"{prefix}.mixer"))


class DenoiserTower(NemotronHModel):
    """Embeddings, layers and final norm of the denoiser; construct it after the context tower it reads."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__(
            vllm_config=vllm_config,
            prefix=prefix,
            decoder_layer_types={
                "M": DenoiserMambaLayer,
                "*": DenoiserAttentionLayer,
                "-": DenoiserMLPLayer,
                "E": DenoiserMoELayer,
            },
        )

    def forward(self, input_ids: Tensor, rows: CanvasRows, shared: Tensor, tables: nn.ParameterList) -> Tensor:
        """Hidden states (T, H) of the canvas tokens.

        Args: input_ids (T,); shared (R, 3, H), the time conditioning of each row; tables, one (3, H) a layer.
        """
        x, mixed = self.embed_input_ids(input_ids), None
        gate: Tensor | None = None
        modulation = shared + torch.stack(tuple(tables))[:, None]  # (layers, R, 3, H)
        modulation[:, :, 1] += 1
        for layer, of_layer in zip(self.layers, modulation, strict=True):
            shift, scale, next_gate = of_layer.unbind(1)
            x, mixed = layer(x, mixed, gate, shift, scale, rows)
            gate = next_gate
        assert mixed is not None
        assert gate is not None
        x = torch.addcmul(rows.by_row(x), gate.unsqueeze(1), rows.by_row(mixed))
        return self.norm_f(x.flatten(0, 1))
