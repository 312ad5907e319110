"""The kernel of :mod:`vllm_twotower.kernels.random_numbers`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _logical_shift(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685
    return x ^ _logical_shift(x, 31)


@triton.jit
def _uniform(out, seed, counters, size, NUM_COUNTERS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    place = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    is_inside = place < size
    state = _mix(tl.load(seed + place, mask=is_inside, other=0))
    for i in tl.static_range(NUM_COUNTERS):
        counter = tl.load(counters + i * size + place, mask=is_inside, other=0)
        state = _mix(state + counter * -7046029254386353131)
    tl.store(out + place, _logical_shift(state, 11).to(tl.float64) * (1.0 / 9007199254740992), mask=is_inside)


def uniform(seed: Tensor, *counters: Tensor) -> Tensor:
    """The numbers, by one launch beside that which brings the counters together."""
    seed, *counters = torch.broadcast_tensors(seed, *counters)
    together, out = torch.stack(counters).long(), torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    size = out.numel()
    _uniform[(triton.cdiv(size, BLOCK),)](
        out, seed.long().contiguous(), together, size, NUM_COUNTERS=len(counters), BLOCK_SIZE=BLOCK
    )
    return out
