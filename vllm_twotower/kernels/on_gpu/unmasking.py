"""The kernel of :mod:`vllm_twotower.kernels.unmasking`: one program a canvas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unmask(out, confidence, masked, step, threshold, max_steps, positions, row_stride, POSITIONS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, POSITIONS)
    is_inside = position < positions
    score = tl.load(confidence + row * positions + position, mask=is_inside, other=0.0)
    is_masked = tl.load(masked + row * row_stride + position, mask=is_inside, other=0) != 0
    left = tl.maximum(tl.load(max_steps + row) - tl.load(step + row), 1)
    count = tl.sum(is_masked.to(tl.int32), 0)
    confident = tl.sum((is_masked & (score > tl.load(threshold + row))).to(tl.int32), 0)
    k = tl.maximum(tl.maximum(confident, (count + left - 1) // left), 1)
    # Of equal scores the first comes first.
    is_before = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (position[None, :] < position[:, None])
    )
    rank = tl.sum((is_before & is_masked[None, :]).to(tl.int32), 1)
    tl.store(out + row * positions + position, is_masked & (rank < k), mask=is_inside)


def most_confident(confidence: Tensor, masked: Tensor, threshold: Tensor, step: Tensor, max_steps: Tensor) -> Tensor:
    """The most confident masked positions of each row; the last dimension of ``masked`` is contiguous."""
    rows, positions = masked.shape
    out = torch.empty((rows, positions), dtype=torch.bool, device=masked.device)
    _unmask[(rows,)](
        out,
        confidence.contiguous(),
        masked,
        step,
        threshold,
        max_steps,
        positions,
        masked.stride(0),
        POSITIONS=triton.next_power_of_2(positions),
        num_warps=1,
    )
    return out
