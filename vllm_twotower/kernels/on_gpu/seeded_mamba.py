"""The kernels of :mod:`vllm_twotower.kernels.seeded_mamba`, which read and write states where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNEL_BLOCK, STATE_BLOCK = 32, 16
"""Of a program of the scan, which reads a state's entries in blocks."""


@triton.jit
def _conv(
    out,
    fresh,
    states,
    indices,
    weight,
    bias,
    positions,
    channels,
    fresh_row,
    fresh_position,
    state_slot,
    state_tap,
    state_channel,
    weight_channel,
    weight_tap,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    position = tl.arange(0, POSITIONS)[:, None]
    is_channel, is_inside = channel < channels, (position < positions) & (channel < channels)
    state = states + tl.load(indices + row).to(tl.int64) * state_slot + channel * state_channel
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for tap in tl.static_range(TAPS):
        taken = position + (tap - TAPS + 1)
        here = fresh + row * fresh_row + taken * fresh_position + channel
        new = tl.load(here, mask=is_inside & (taken >= 0), other=0.0)
        old = tl.load(state + (taken + TAPS - 1) * state_tap, mask=is_inside & (taken < 0), other=0.0)
        factor = tl.load(weight + channel * weight_channel + tap * weight_tap, mask=is_channel, other=0.0)
        value = tl.where(taken >= 0, new, old.to(new.dtype)).to(tl.float32)
        total += value * factor.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    result = total / (1 + tl.exp(-total))
    tl.store(out + (row * positions + position) * channels + channel, result, mask=is_inside)


def seeded_conv(xbc: Tensor, states: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution, then SiLU; the last dimension of ``xbc`` is contiguous."""
    rows, positions, channels = xbc.shape
    out = torch.empty(xbc.shape, dtype=torch.float32, device=xbc.device)
    block = 64
    _conv[rows, triton.cdiv(channels, block)](
        out,
        xbc,
        states,
        indices,
        weight,
        bias,
        positions,
        channels,
        *xbc.stride()[:2],
        *states.stride(),
        *weight.stride(),
        TAPS=weight.shape[1],
        HAS_BIAS=bias is not None,
        POSITIONS=triton.next_power_of_2(positions),
        BLOCK=block,
    )
    return out


@triton.jit
def _softplus(x):
    # log(1 + u) without the digits of u that 1 + u loses (Higham, Accuracy and Stability, section 1.14.1).
    u = tl.exp(-tl.abs(x))
    w = 1 + u
    return tl.maximum(x, 0.0) + tl.where(w == 1, u, tl.log(w) * (u / (w - 1)))


@triton.jit
def _scan(
    out,
    x,
    dt,
    dt_bias,
    a,
    b,
    c,
    d,
    states,
    indices,
    lengths,
    positions,
    channels,
    size,
    x_row,
    x_position,
    x_head,
    dt_row,
    dt_position,
    b_row,
    b_position,
    b_group,
    c_row,
    c_position,
    c_group,
    state_slot,
    state_head,
    state_channel,
    HAS_LENGTHS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // HEADS_PER_GROUP
    position, channel = tl.arange(0, POSITIONS), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_position, is_channel = position < positions, channel < channels
    if HAS_LENGTHS:
        is_position = position < tl.load(lengths + row)
    of_b = b + row * b_row + group * b_group + position[:, None] * b_position
    of_c = c + row * c_row + group * c_group + position[:, None] * c_position
    seed = (
        states + tl.load(indices + row).to(tl.int64) * state_slot + head * state_head + channel[:, None] * state_channel
    )
    scores = tl.zeros((POSITIONS, POSITIONS), tl.float32)
    carried = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_entry = entry < size
        is_bc = is_position[:, None] & is_entry[None, :]
        queries = tl.load(of_c + entry[None, :], mask=is_bc, other=0.0)
        keys = tl.load(of_b + entry[None, :], mask=is_bc, other=0.0)
        kept = tl.load(seed + entry[None, :], mask=is_channel[:, None] & is_entry[None, :], other=0.0).to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision="ieee")
        carried = tl.dot(queries, tl.trans(kept), carried, input_precision="ieee")

    raw = tl.load(dt + row * dt_row + position * dt_position + head, mask=is_position, other=0.0).to(tl.float32)
    step = tl.where(is_position, _softplus(raw + tl.load(dt_bias + head).to(tl.float32)), 0.0)
    log_decay = tl.cumsum(step * tl.load(a + head), 0)
    # Later positions would overflow: their decay is that of a negative time.
    age = tl.where(position[:, None] >= position[None, :], log_decay[:, None] - log_decay[None, :], float("-inf"))
    mixing = scores * tl.exp(age) * step[None, :]
    is_x = is_position[:, None] & is_channel[None, :]
    of_x = x + row * x_row + head * x_head + position[:, None] * x_position + channel[None, :]
    values = tl.load(of_x, mask=is_x, other=0.0)
    y = tl.dot(mixing, values, carried * tl.exp(log_decay)[:, None], input_precision="ieee")
    y += values * tl.load(d + head).to(tl.float32)
    of_out = out + ((row * positions + position[:, None]) * HEADS + head) * channels + channel[None, :]
    tl.store(of_out, y, mask=is_x)


def seeded_scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    states: Tensor,
    indices: Tensor,
    out: Tensor,
    lengths: Tensor | None = None,
) -> None:
    """Selective scan from the states at ``indices``; ``out`` is contiguous, of the others the last dimension is."""
    rows, positions, heads, channels = x.shape
    groups, size = b.shape[2:]
    # tl.dot takes no less than sixteen of each; larger tiles than these spill registers.
    of_positions, of_channels, of_size = (max(16, triton.next_power_of_2(n)) for n in (positions, channels, size))
    channel_block, block = min(of_channels, CHANNEL_BLOCK), min(of_size, STATE_BLOCK)
    _scan[rows, heads, triton.cdiv(channels, channel_block)](
        out,
        x,
        dt,
        dt_bias,
        a,
        b,
        c,
        d,
        states,
        indices,
        lengths,
        positions,
        channels,
        size,
        *x.stride()[:3],
        *dt.stride()[:2],
        *b.stride()[:3],
        *c.stride()[:3],
        *states.stride()[:3],
        HAS_LENGTHS=lengths is not None,
        HEADS=heads,
        HEADS_PER_GROUP=heads // groups,
        POSITIONS=of_positions,
        CHANNELS=channel_block,
        SIZE=of_size,
        BLOCK=block,
    )


@triton.jit
def _advance(
    x,
    dt,
    dt_bias,
    a,
    b,
    counts,
    states,
    indices,
    channels,
    size,
    x_row,
    x_position,
    x_head,
    dt_row,
    dt_position,
    b_row,
    b_position,
    b_group,
    state_slot,
    state_head,
    state_channel,
    HEADS_PER_GROUP: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, channel = tl.arange(0, POSITIONS), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_read, is_channel = position < tl.load(counts + row), channel < channels
    raw = tl.load(dt + row * dt_row + position * dt_position + head, mask=is_read, other=0.0).to(tl.float32)
    step = tl.where(is_read, _softplus(raw + tl.load(dt_bias + head).to(tl.float32)), 0.0)
    log_decay = tl.cumsum(step * tl.load(a + head), 0)
    total = tl.sum(step * tl.load(a + head))
    of_x = x + row * x_row + head * x_head + position[:, None] * x_position + channel[None, :]
    values = tl.load(of_x, mask=is_read[:, None] & is_channel[None, :], other=0.0)
    values *= (tl.exp(total - log_decay) * step)[:, None]
    of_b = b + row * b_row + head // HEADS_PER_GROUP * b_group + position[:, None] * b_position
    state = (
        states + tl.load(indices + row).to(tl.int64) * state_slot + head * state_head + channel[:, None] * state_channel
    )
    for start in tl.static_range(0, SIZE, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_entry = entry < size
        is_state = is_channel[:, None] & is_entry[None, :]
        keys = tl.load(of_b + entry[None, :], mask=is_read[:, None] & is_entry[None, :], other=0.0)
        kept = tl.load(state + entry[None, :], mask=is_state, other=0.0).to(tl.float32) * tl.exp(total)
        tl.store(state + entry[None, :], tl.dot(tl.trans(values), keys, kept, input_precision="ieee"), mask=is_state)


@triton.jit
def _shift(
    fresh,
    counts,
    states,
    indices,
    channels,
    fresh_row,
    fresh_position,
    state_slot,
    state_tap,
    state_channel,
    KEPT: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tap = tl.arange(0, TAPS)[:, None]
    is_kept = (tap < KEPT) & (channel < channels)
    taken = tl.load(counts + row) + tap
    state = states + tl.load(indices + row).to(tl.int64) * state_slot + channel * state_channel
    old = tl.load(state + taken * state_tap, mask=is_kept & (taken < KEPT), other=0.0)
    here = fresh + row * fresh_row + (taken - KEPT) * fresh_position + channel
    new = tl.load(here, mask=is_kept & (taken >= KEPT), other=0.0)
    tl.debug_barrier()  # no thread writes what another has yet to read
    tl.store(state + tap * state_tap, tl.where(taken < KEPT, old, new.to(old.dtype)), mask=is_kept)


def commit_states(
    xbc: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    conv_states: Tensor,
    states: Tensor,
    indices: Tensor,
) -> None:
    """The states at ``indices`` after the first ``counts`` positions; the last dimensions are contiguous."""
    rows, positions, heads, channels = x.shape
    groups, size = b.shape[2:]
    of_positions, of_channels, of_size = (max(16, triton.next_power_of_2(n)) for n in (positions, channels, size))
    channel_block, block = min(of_channels, CHANNEL_BLOCK), min(of_size, STATE_BLOCK)
    _advance[rows, heads, triton.cdiv(channels, channel_block)](
        x,
        dt,
        dt_bias,
        a,
        b,
        counts,
        states,
        indices,
        channels,
        size,
        *x.stride()[:3],
        *dt.stride()[:2],
        *b.stride()[:3],
        *states.stride()[:3],
        HEADS_PER_GROUP=heads // groups,
        POSITIONS=of_positions,
        CHANNELS=channel_block,
        SIZE=of_size,
        BLOCK=block,
    )
    kept, conv_block = conv_states.shape[1], 64
    _shift[rows, triton.cdiv(xbc.shape[2], conv_block)](
        xbc,
        counts,
        conv_states,
        indices,
        xbc.shape[2],
        *xbc.stride()[:2],
        *conv_states.stride(),
        KEPT=kept,
        TAPS=triton.next_power_of_2(kept),
        BLOCK=conv_block,
    )
