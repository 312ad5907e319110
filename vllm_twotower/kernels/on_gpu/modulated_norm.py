"""The kernel of :mod:`vllm_twotower.kernels.modulated_norm`: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    eps,
    gate_row,
    shift_row,
    scale_row,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token // positions
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    here = token * channels + channel
    dtype = out.dtype.element_ty
    of_gate = tl.load(gate + row * gate_row + channel, mask=is_channel, other=0.0).to(tl.float32)
    of_shift = tl.load(shift + row * shift_row + channel, mask=is_channel, other=0.0).to(tl.float32)
    of_scale = tl.load(scale + row * scale_row + channel, mask=is_channel, other=0.0).to(tl.float32)
    of_weight = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    added = tl.load(mixed + here, mask=is_channel, other=0.0).to(tl.float32) * of_gate
    total = tl.load(x + here, mask=is_channel, other=0.0).to(tl.float32) + added
    total = total.to(dtype).to(tl.float32)
    tl.store(out + here, total, mask=is_channel)
    if not BEFORE:
        # Channels behind the last one stay out of the mean.
        total = tl.where(is_channel, (of_shift + total * of_scale).to(dtype).to(tl.float32), 0.0)
    result = total * tl.rsqrt(tl.sum(total * total) / channels + eps)
    result = (result.to(dtype).to(tl.float32) * of_weight).to(dtype)
    if BEFORE:
        result = of_shift + result.to(tl.float32) * of_scale
    tl.store(normed + here, result, mask=is_channel)


def gated_residual_norm(
    x: Tensor, mixed: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, eps: float, before: bool
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
        tokens // len(gate),
        channels,
        eps,
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        BEFORE=before,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )
    return out, normed
