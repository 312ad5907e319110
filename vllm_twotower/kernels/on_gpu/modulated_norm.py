"""The kernel of :mod:`vllm_twotower.kernels.modulated_norm`: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _total(
    x,
    mixed,
    gate,
    token,
    positions,
    channels,
    gate_row,
    dtype: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    is_channel, here = channel < channels, token * channels + channel
    total = tl.load(x + here, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        of_gate = tl.load(gate + token // positions * gate_row + channel, mask=is_channel, other=0.0).to(tl.float32)
        total += tl.load(mixed + here, mask=is_channel, other=0.0).to(tl.float32) * of_gate
    return total.to(dtype).to(tl.float32)


@triton.jit
def _gated_residual_norm(
    out,
    normed,
    x,
    mixed,
    gate,
    shift,
    scale,
    weight,
    positions,
    channels,
    is_padding,
    eps,
    gate_row,
    shift_row,
    scale_row,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    is_channel, here = channel < channels, token * channels + channel
    dtype = out.dtype.element_ty
    total = _total(x, mixed, gate, token, positions, channels, gate_row, dtype, HAS_RESIDUAL, BLOCK)
    tl.store(out + here, total, mask=is_channel)
    if HAS_PADDING:
        token = tl.where(tl.load(is_padding + token), 0, token)
        total = _total(x, mixed, gate, token, positions, channels, gate_row, dtype, HAS_RESIDUAL, BLOCK)
    row = token // positions
    of_shift = tl.load(shift + row * shift_row + channel, mask=is_channel, other=0.0).to(tl.float32)
    of_scale = tl.load(scale + row * scale_row + channel, mask=is_channel, other=0.0).to(tl.float32)
    of_weight = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    if not BEFORE:
        # Channels behind the last one stay out of the mean.
        total = tl.where(is_channel, (of_shift + total * of_scale).to(dtype).to(tl.float32), 0.0)
    result = total * tl.rsqrt(tl.sum(total * total) / channels + eps)
    result = (result.to(dtype).to(tl.float32) * of_weight).to(dtype)
    if BEFORE:
        result = of_shift + result.to(tl.float32) * of_scale
    tl.store(normed + here, result, mask=is_channel)


def gated_residual_norm(
    x: Tensor,
    mixed: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    before: bool,
    is_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated residual, RMSNorm and modulation; x and mixed are contiguous, of the others the last dimension is."""
    out, normed = torch.empty_like(x), torch.empty_like(x)
    tokens, channels = x.shape
    block = triton.next_power_of_2(channels)
    _gated_residual_norm[(tokens,)](
        out,
        normed,
        x,
        mixed,
        gate,
        shift,
        scale,
        weight,
        tokens // len(shift),
        channels,
        is_padding,
        eps,
        0 if gate is None else gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        HAS_RESIDUAL=mixed is not None,
        HAS_PADDING=is_padding is not None,
        BEFORE=before,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )
    return out, normed
