"""Likelihoods of held-out answers, with the plain model: perplexity, the denoiser's bound, cross-entropy by place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_twotower.progress import progress
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training.problems import Problem

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Likelihood:
    """In nats a token of answers, EOS among them.

    ``context`` is the context tower's mean cross-entropy. ``denoiser_bound`` is an upper bound of the denoiser's
    negative log-likelihood, for blocks that follow each other from the answer's start on: the integral over t of the
    cross-entropy at masked positions divided by t (arXiv 2406.07524 for the absorbing process), here estimated at
    stratified t. ``by_offset`` (S,) is the cross-entropy at each place of a wholly masked block.
    """

    context: float
    denoiser_bound: float
    by_offset: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(self.context)


@torch.inference_mode()
def likelihood(
    model: TwoTowerModel, problems: Sequence[Problem], encode: Encode, bos: int, strata: int, seed: int
) -> Likelihood:
    """Goes through the problems one by one; ``strata`` values of t for every block."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    width, eos, mask = config.canvas_length, config.eos_token_id, config.mask_token_id
    context, bound, tokens = 0.0, 0.0, 0
    offsets, counts = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for problem in progress(problems, "likelihoods", "problems"):
        prompt, answer = [bos, *encode(problem.prompt)], [*encode(problem.answer), eos]
        text = torch.tensor([prompt + answer])
        logits = model.context_logits(text[:, :-1])[0, len(prompt) - 1 :]
        context += F.cross_entropy(logits.float(), text[0, len(prompt) :], reduction="sum").item()
        tokens += len(answer)

        blocks = -(-len(answer) // width)
        targets = torch.tensor(answer + [eos] * (blocks * width - len(answer))).view(1, blocks, width)
        is_text = (torch.arange(blocks * width) < len(answer)).view(1, blocks, width)
        starts = len(prompt) + torch.arange(blocks)[None] * width

        def losses(masked: Tensor, t: Tensor, text=text, starts=starts, targets=targets) -> Tensor:
            canvas = targets.masked_fill(masked, mask)
            logits = model.denoise_blocks(text, starts, canvas, t).float()
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

        whole = losses(torch.ones_like(is_text), torch.ones(1, blocks)) * is_text
        offsets += whole.sum((0, 1)).double()
        counts += is_text.sum((0, 1)).double()
        for stratum in range(strata):
            t = (stratum + torch.rand(1, blocks, generator=generator)) / strata
            masked = torch.rand(targets.shape, generator=generator) < t[..., None]
            # The denoiser is told the fraction that is masked, as at inference.
            share = masked.float().mean(-1).clamp(min=1 / width)
            bound += ((losses(masked, share) * masked).sum(-1) / t).sum().item() / strata
    return Likelihood(context / tokens, bound / tokens, (offsets / counts.clamp(min=1)).tolist())
