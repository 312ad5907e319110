"""Paged attention, paged Mamba states and experts in plain torch, which read and write nothing but tensors.

What a captured pass runs on a GPU are kernels of the same kind. The ones for CPUs look at values on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.layers.attention.attention import Attention
from vllm.utils.torch_utils import _resolve_layer_name
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_twotower.engine import pass_planner
from vllm_twotower.engine.prefix_cache import state_column
from vllm_twotower.kernels import seeded_conv
from vllm_twotower.model.context import UncommittedRead
from vllm_twotower.model.moe_cpu import CpuMoE


@contextmanager
def torch_attention() -> Iterator[None]:
    """Engines that run in this block keep keys and values in pages that these functions can read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUAttentionBackendImpl, "forward", _attend)
        patch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", _write)
        yield


@contextmanager
def torch_layers(layers: dict[str, Any], state_block_size: int) -> Iterator[None]:
    """All layers in torch, for passes whose rows have the same width; ``layers`` by name are those of the model."""
    with torch_attention(), pytest.MonkeyPatch.context() as patch:
        for layer in layers.values():
            if isinstance(layer, Attention):
                patch.setattr(layer, "use_direct_call", True)
        patch.setattr(torch.ops.vllm, "unified_kv_cache_update", attention.unified_kv_cache_update)
        patch.setattr(torch.ops.vllm, "mamba_mixer2", _mix)
        patch.setattr(CpuMoE, "forward", _all_experts)
        patch.setattr(pass_planner, "build_attn_metadata", lambda **given: _metadata(state_block_size, **given))
        yield


def _metadata(state_block_size: int, **given: Any) -> dict[str, Any]:
    """What the layers read, by name."""
    metadata, seq_lens = {}, given["seq_lens"]
    column = state_column(seq_lens.long(), state_block_size)[:, None]
    for table, slots, groups in zip(given["block_tables"], given["slot_mappings"], given["attn_groups"], strict=True):
        for group in groups:
            of_group = SimpleNamespace(
                query_start_loc=given["query_start_loc_gpu"],
                seq_lens=seq_lens,
                block_table=table,
                slot_mapping=slots,
                causal=given["causal"],
                state_indices=table.gather(1, column)[:, 0].long(),
            )
            metadata |= dict.fromkeys(group.layer_names, of_group)
    return metadata


def _write(self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """A slot below zero stands for none: what is there is written to the null page again."""
    pages = kv_cache.shape[2]
    slots = slot_mapping.clamp(min=0)
    written = (slot_mapping >= 0)[:, None, None]
    place = (slots // pages, slice(None), slots % pages)
    kv_cache[place] = torch.where(written, torch.cat((key, value), -1), kv_cache[place])


def _attend(
    self: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    metadata: Any,
    output: Tensor,
    **options: Any,
) -> Tensor:
    """Every token looks at all pages of its row; ``kv_cache`` (pages, heads, page size, 2 * size)."""
    if metadata is None:
        return output
    tokens = torch.arange(len(query), device=query.device)
    row = torch.searchsorted(metadata.query_start_loc[1:], tokens, right=True, out_int32=False)
    row = row.clamp(max=len(metadata.seq_lens) - 1)
    lengths = metadata.seq_lens[row]
    pages = (
        kv_cache[metadata.block_table.long()].permute(0, 2, 1, 3, 4).flatten(2, 3)
    )  # (R, heads, positions, 2 * size)
    keys, values = pages[row].chunk(2, -1)
    position = torch.arange(keys.shape[2], device=query.device)
    limit = lengths - (metadata.query_start_loc[1:][row] - tokens) + 1 if metadata.causal else lengths
    visible = (position < limit[:, None])[:, None, None]
    # What lies behind a row's text need not be finite.
    values = torch.where(visible.transpose(2, 3), values, 0)
    of_heads = query.view(len(query), self.num_kv_heads, -1, self.head_size) * self.scale
    scores = (of_heads @ keys.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    probabilities = scores.softmax(-1).nan_to_num(0)
    output.view(of_heads.shape).copy_(probabilities @ values)
    return output


def _mix(projected: Tensor, output: Tensor, layer_name: Any) -> None:
    """The context tower's Mamba layer, token after token from the state of each row."""
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    mixer, metadata = context.no_compile_layers[name], context.attn_metadata[name]
    if isinstance(metadata, UncommittedRead):  # in torch as it is
        mixer.conv_ssm_forward(projected, output)
        return
    conv_cache, ssm_cache = mixer.kv_cache
    index, rows = metadata.state_indices, len(metadata.seq_lens)
    width = len(projected) // rows
    is_first = (metadata.seq_lens <= width)[:, None, None]
    inner = mixer.tped_intermediate_size
    xbc, dt = projected[:, inner:].view(rows, width, -1).split([mixer.tped_conv_size, mixer.tped_dt_size], -1)
    before = conv_cache[index].masked_fill(is_first, 0)
    state = ssm_cache[index].float().masked_fill(is_first[..., None], 0)
    of_rows = torch.arange(rows, device=before.device)
    conv = seeded_conv(xbc, before, of_rows, mixer.conv_weights, mixer.conv1d.bias)
    x, b, c = mixer.split_hidden_states_B_C_fn(conv)
    per_group = mixer.num_heads // mixer.n_groups
    x = x.unflatten(-1, (-1, mixer.head_dim))
    b, c = (y.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(per_group, 2) for y in (b, c))
    dt = F.softplus(dt.float() + mixer.dt_bias.float())
    outputs = []
    for i in range(width):
        decay = torch.exp(dt[:, i] * mixer.A)[..., None, None]
        state = decay * state + (dt[:, i, :, None] * x[:, i])[..., None] * b[:, i, :, None]
        outputs.append((state * c[:, i, :, None]).sum(-1) + mixer.D[:, None] * x[:, i])
    output.copy_(torch.stack(outputs, 1).flatten(2).flatten(0, 1))
    is_row = (metadata.seq_lens > 0)[:, None, None]
    after = torch.cat((before, xbc), 1)[:, width:]
    conv_cache[index] = torch.where(is_row, after, conv_cache[index])
    ssm_cache[index] = torch.where(is_row[..., None], state.to(ssm_cache.dtype), ssm_cache[index])


def _all_experts(self: CpuMoE, hidden_states: Tensor) -> Tensor:
    """Every token passes all experts, most with weight zero."""
    experts, weights = self.route(hidden_states)
    of_expert = torch.zeros(len(hidden_states), self.num_experts, dtype=weights.dtype)
    of_expert = of_expert.scatter(1, experts, weights).to(hidden_states.dtype)
    out = self.shared_experts(hidden_states)
    for i, expert in enumerate(self.experts):
        hidden = F.linear(F.relu(F.linear(hidden_states, expert.up_proj.weight)).square(), expert.down_proj.weight)
        out = out + hidden * of_expert[:, i, None]
    return out
