"""Blocks that take as many denoiser passes as those of the released model, for benchmarks alone.

The embedded model fills most blocks in one pass, the released one takes five on average: an engine that is fast with
the one may not be with the other. The strategy draws a block's passes from the measured histogram, and commits an equal
share of what is left in each.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vllm_twotower.kernels import uniform
from vllm_twotower.sampling import strategies
from vllm_twotower.sampling.row_options import RowOptions
from vllm_twotower.sampling.strategies import Commit, DenoiserPass, Strategy, most

RELEASED = "released_passes"
BLOCKS_BY_PASSES = (43, 17, 13, 19, 7, 8, 10, 11, 6, 2, 4, 3, 4, 4, 5, 4)
"""Blocks of 16 tokens that took 1, 2, ... 16 passes at threshold 0.8: 160 of arithmetic problems, with 5.2 on average.

Measured on the released checkpoint (github.com/junze-eng/twotower-repro, analysis_data). Open prompts take 10.5.
"""


def register() -> None:
    """Makes the strategy a value of ``diffusion_strategy``, in this process and its engines, which are forked."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    strategies.BUILT_IN[RELEASED] = Strategy(_commit)
    strategies.strategies.cache_clear()


def passes_of(denoised: DenoiserPass, options: RowOptions) -> Tensor:
    """The passes (R,) that each row's block takes: the same for the same seed and position."""
    counts = torch.tensor(BLOCKS_BY_PASSES, dtype=torch.float64).cumsum(0)
    number = uniform(options.seed, denoised.start) * counts[-1]
    return torch.searchsorted(counts, number, right=True) + 1


def _commit(denoised: DenoiserPass, options: RowOptions) -> Commit:
    left = (passes_of(denoised, options) - denoised.step).clamp(min=1)
    share = -(-denoised.masked.sum(1) // left)
    return Commit(most(denoised.confidence, denoised.masked, share), denoised.step)
