"""The layers of Nemotron-H in plain PyTorch, each a pure function of its input and an explicit state.

Semantics: NVIDIA's released ``modeling_nemotron_twotower.py`` and the Mamba-2 paper (arXiv 2405.21060). Shapes:
``B`` batch, ``L`` positions, ``H`` hidden size; a Mamba layer has ``n`` heads of ``p`` channels, state size ``s``,
``g`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_twotower.architecture import TwoTowerConfig

SCAN_CHUNK = 32
"""Positions the scan treats as one matrix product; a matter of speed only."""


@dataclass
class AttentionState:
    """Keys and values (B, L, KV heads, head_dim) of all positions so far."""

    keys: Tensor
    values: Tensor


@dataclass
class MambaState:
    """``conv`` (B, conv_kernel - 1, conv_dim): the last inputs of the convolution; ``ssm`` (B, n, p, s) in fp32."""

    conv: Tensor
    ssm: Tensor


LayerState = AttentionState | MambaState | None
"""What a layer remembers of the past; MLP and MoE layers remember nothing."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, L, heads, head_dim), keys and values (B, P + L, KV heads, head_dim) -> output, shaped as the queries."""

BlockAttention = Callable[[Tensor, int, int], Attend]
"""How N blocks of S tokens attend, from their starts (B, N), S and the length L of a sequence.

The keys are those of the L tokens, then those of the N * S: block n sees the tokens before its start, and itself.
"""


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32, multiplied by the weight before rounding."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * y).to(x.dtype)


class GatedGroupRMSNorm(nn.Module):
    """Mamba-2's output norm: multiply by silu(gate), then RMSNorm within each group of channels."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = x.float() * F.silu(gate.float())
        grouped = y.unflatten(-1, (self.groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * grouped.flatten(-2)).to(x.dtype)


class MLP(nn.Module):
    """down(relu(up(x))²)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(relu2(self.up_proj(x)))


class Router(nn.Module):
    """Sigmoid router in fp64; the correction bias takes part in the choice of experts, not in their weights."""

    def __init__(self, c: TwoTowerConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.top_k, self.normalise, self.scale = c.num_experts_per_tok, c.norm_topk_prob, c.routed_scaling_factor
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, H) -> experts (T, k) and their weights (T, k) in fp64."""
        scores = torch.sigmoid(F.linear(x.double(), self.weight.double()))
        experts = torch.topk(scores + self.e_score_correction_bias.double(), self.top_k, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scale


class MoE(nn.Module):
    """Routed relu² experts plus a shared one, whose output is added unscaled."""

    def __init__(self, c: TwoTowerConfig):
        super().__init__()
        self.gate = Router(c)
        self.experts = nn.ModuleList(
            MLP(c.hidden_size, c.moe_intermediate_size, c.mlp_bias) for _ in range(c.n_routed_experts)
        )
        self.shared_experts = MLP(c.hidden_size, c.moe_shared_expert_intermediate_size, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for index in experts.unique().tolist():
            rows, slots = torch.where(experts == index)
            out.index_add_(0, rows, self.experts[index](tokens[rows]) * weights[rows, slots, None].to(x.dtype))
        return out.view_as(x) + self.shared_experts(x)


class Attention(nn.Module):
    """Grouped-query attention without positional encoding, scale 1/sqrt(head_dim)."""

    def __init__(self, c: TwoTowerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, past: AttentionState | None, attend: Attend) -> tuple[Tensor, AttentionState]:
        """x (B, L, H), ``past`` of P positions: the output (B, L, H) and the state with the new positions appended."""
        keys = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        values = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if past is not None:
            keys, values = torch.cat((past.keys, keys), 1), torch.cat((past.values, values), 1)
        queries = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        return self.o_proj(attend(queries, keys, values).flatten(-2)), AttentionState(keys, values)


def dense_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """An :data:`Attend` with a mask (B or 1, L, P + L) of allowed pairs, or None for all of them.

    ``is_causal``, only without a past and a mask: position i sees positions up to i, in linear memory.
    """
    repeats = queries.shape[2] // keys.shape[2]
    return F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.repeat_interleave(repeats, 2).transpose(1, 2),
        values.repeat_interleave(repeats, 2).transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=is_causal,
    ).transpose(1, 2)


def causal_mask(length: int, past: int, device: torch.device) -> Tensor:
    """(1, length, past + length): position i sees the past and positions up to i."""
    return torch.ones(1, length, past + length, dtype=torch.bool, device=device).tril(past)


def dense_blocks(block_starts: Tensor, width: int, length: int) -> Attend:
    """A :data:`BlockAttention` with a mask of all pairs, whose memory grows with the square of the length."""
    batch, blocks = block_starts.shape
    before = torch.arange(length, device=block_starts.device) < block_starts[..., None]  # (B, N, L)
    own = torch.eye(blocks, dtype=torch.bool, device=block_starts.device).expand(batch, -1, -1)
    mask = torch.cat((before, own.repeat_interleave(width, 2)), 2).repeat_interleave(width, 1)
    return partial(dense_attention, mask=mask)


@dataclass
class ScanTrace:
    """What a chunked scan knows of its states, enough to give the state before any position.

    ``boundaries`` (B, chunks + 1, n, p, s): the state before each chunk and after the last; ``inputs``
    (B, chunks, Q, n, p): dt * x; ``keys`` (B, chunks, Q, n, s): B; ``log_decay`` (B, chunks, Q, n): cumulative
    dt * A within the chunk.
    """

    boundaries: Tensor
    inputs: Tensor
    keys: Tensor
    log_decay: Tensor

    def state_before(self, positions: Tensor) -> Tensor:
        """The states (B, N, n, p, s) before ``positions`` (B, N)."""
        chunk_size = self.inputs.shape[2]
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        chunk, offset = positions // chunk_size, positions % chunk_size
        within = chunk.clamp(max=self.inputs.shape[1] - 1)  # a position at the very end has offset 0
        log_decay = F.pad(self.log_decay, (0, 0, 1, 0))[batch, within]  # (B, N, Q + 1, n)
        until = log_decay.gather(2, offset[..., None, None].expand(-1, -1, 1, log_decay.shape[-1]))
        inside = torch.arange(chunk_size, device=positions.device) < offset[..., None]
        weight = (until - log_decay[:, :, 1:]).masked_fill(~inside[..., None], -math.inf).exp()
        partial = torch.einsum("bNqn,bNqnp,bNqns->bNnps", weight, self.inputs[batch, within], self.keys[batch, within])
        return self.boundaries[batch, chunk] * until.squeeze(2).exp()[..., None, None] + partial


def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor) -> tuple[Tensor, ScanTrace]:
    """The selective scan ``h = exp(dt A) h + dt B x; y = C h`` in chunks (arXiv 2405.21060, section 6).

    Args: x (B, L, n, p), dt (B, L, n), a (n,), b and c (B, L, n, s), initial (B, n, p, s); all fp32.
    Returns y (B, L, n, p) and the trace of the states.
    """
    length = x.shape[1]
    chunk = min(SCAN_CHUNK, length)

    def chunked(tensor: Tensor) -> Tensor:  # padding has dt = 0: it changes no state
        padding = [0, 0] * (tensor.ndim - 2) + [0, -length % chunk]
        return F.pad(tensor, padding).unflatten(1, (-1, chunk))

    inputs, b, c = chunked(x * dt[..., None]), chunked(b), chunked(c)
    log_decay = chunked(dt * a).cumsum(2)  # (B, C, Q, n)
    pairwise = log_decay.unsqueeze(3) - log_decay.unsqueeze(2)  # (B, C, Q, Q, n)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[..., None]
    decay = pairwise.masked_fill(~later, -math.inf).exp()
    scores = torch.einsum("bcins,bcjns->bcijn", c, b) * decay
    y = torch.einsum("bcijn,bcjnp->bcinp", scores, inputs)

    to_end = (log_decay[:, :, -1:] - log_decay).exp()
    added = torch.einsum("bcqn,bcqnp,bcqns->bcnps", to_end, inputs, b)
    whole = log_decay[:, :, -1].exp()[..., None, None]
    boundaries = [initial]
    for i in range(added.shape[1]):
        boundaries.append(boundaries[-1] * whole[:, i] + added[:, i])
    states = torch.stack(boundaries, 1)
    carried = torch.einsum("bcqns,bcnps->bcqnp", c, states[:, :-1]) * log_decay.exp()[..., None]
    y = (y + carried).flatten(1, 2)[:, :length]
    return y, ScanTrace(states, inputs, b, log_decay)


@dataclass
class MambaTrace:
    """The convolution's inputs with their past (B, k - 1 + L, conv_dim), and the trace of the scan."""

    conv_inputs: Tensor
    scan: ScanTrace

    def state_before(self, positions: Tensor, history: int) -> MambaState:
        """The state before ``positions`` (B, N), as one of batch B * N."""
        window = positions[..., None] + torch.arange(history, device=positions.device)  # (B, N, k - 1)
        batch = torch.arange(len(positions), device=positions.device)[:, None, None]
        conv = self.conv_inputs[batch, window]  # (B, N, k - 1, conv_dim)
        return MambaState(conv.flatten(0, 1), self.scan.state_before(positions).flatten(0, 1))


class Mamba2(nn.Module):
    """Mamba-2 mixer: gate z, convolution over x, B, C, selective scan in fp32, gated group norm."""

    def __init__(self, c: TwoTowerConfig):
        super().__init__()
        inner, self.heads = c.mamba_intermediate_size, c.mamba_num_heads
        self.groups, self.state_size, self.history = c.n_groups, c.ssm_state_size, c.conv_kernel - 1
        self.splits = (inner, c.conv_dim, self.heads)
        self.in_proj = nn.Linear(c.hidden_size, sum(self.splits), bias=c.mamba_proj_bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim, bias=c.use_conv_bias)
        self.A_log = nn.Parameter(torch.arange(1, self.heads + 1, dtype=torch.float32).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedGroupRMSNorm(inner, self.groups, c.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=c.mamba_proj_bias)

    def initial_state(self, batch: int) -> MambaState:
        """The state before any token: zeros."""
        weight = self.in_proj.weight
        inner, conv_dim, heads = self.splits
        return MambaState(
            weight.new_zeros(batch, self.history, conv_dim),
            weight.new_zeros(batch, heads, inner // heads, self.state_size, dtype=torch.float32),
        )

    def forward(self, x: Tensor, past: MambaState | None) -> tuple[Tensor, MambaTrace]:
        """x (B, L, H) -> output (B, L, H) and the trace from which the state at any position can be had."""
        past = past or self.initial_state(len(x))
        gate, xbc, dt = self.in_proj(x).split(self.splits, -1)
        conv_inputs = torch.cat((past.conv.to(xbc.dtype), xbc), 1)
        xbc = F.silu(self._convolve(conv_inputs, x.shape[1])).float()
        groups = self.groups * self.state_size
        values, b, c = xbc.split((self.splits[0], groups, groups), -1)
        values = values.unflatten(-1, (self.heads, -1))
        b, c = (
            part.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, 2) for part in (b, c)
        )
        dt = F.softplus(dt.float() + self.dt_bias.float())
        y, scan = ssd_scan(values, dt, -self.A_log.float().exp(), b, c, past.ssm)
        y = (y + values * self.D.float()[:, None]).flatten(-2).to(x.dtype)
        return self.out_proj(self.norm(y, gate)), MambaTrace(conv_inputs, scan)

    def _convolve(self, inputs: Tensor, length: int) -> Tensor:
        """Causal depthwise convolution, (B, k - 1 + L, conv_dim) -> (B, L, conv_dim), as a sum over taps.

        On CPUs this trains several times faster than a grouped convolution.
        """
        taps = self.conv1d.weight.squeeze(1).unbind(1)
        first, *others = (inputs[:, k : k + length] * tap for k, tap in enumerate(taps))
        out = sum(others, start=first)
        return out if self.conv1d.bias is None else out + self.conv1d.bias

    def state_after(self, trace: MambaTrace) -> MambaState:
        """The state after the last position of a forward pass."""
        return MambaState(trace.conv_inputs[:, -self.history :], trace.scan.boundaries[:, -1])
