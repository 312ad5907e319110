"""Blocks that take as many denoiser passes as those of the released model, for benchmarks alone.

The embedded model fills most blocks in one pass, the released one takes 5.2 on average for arithmetic problems: an
engine that is fast with the one may not be with the other. The strategy draws a block's passes from the measured
histogram, and commits an equal share of what is left in each.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vllm_twotower.kernels import uniform
from vllm_twotower.planning.texts import ARITHMETIC_BLOCKS
from vllm_twotower.sampling import strategies
from vllm_twotower.sampling.row_options import RowOptions
from vllm_twotower.sampling.strategies import Commit, DenoiserPass, Strategy, most

RELEASED = "released_passes"


def register() -> None:
    """Makes the strategy a value of ``diffusion_strategy``, in this process and its engines, which are forked."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    strategies.BUILT_IN[RELEASED] = Strategy(_commit)
    strategies.strategies.cache_clear()


def passes_of(denoised: DenoiserPass, options: RowOptions) -> Tensor:
    """The passes (R,) that each row's block takes: the same for the same seed and position."""
    counts = torch.tensor(ARITHMETIC_BLOCKS, dtype=torch.float64).cumsum(0)
    number = uniform(options.seed, denoised.start) * counts[-1]
    return torch.searchsorted(counts, number, right=True) + 1


def _commit(denoised: DenoiserPass, options: RowOptions) -> Commit:
    left = (passes_of(denoised, options) - denoised.step).clamp(min=1)
    share = -(-denoised.masked.sum(1) // left)
    return Commit(most(denoised.confidence, denoised.masked, share), denoised.step)
