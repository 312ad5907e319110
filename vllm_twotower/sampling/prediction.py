"""How a token is predicted from logits: pure functions over all rows at once.

T logit rows, vocabulary V. Which predictions of a canvas are kept is the business of
:mod:`~vllm_twotower.sampling.strategies`. Nothing here knows of vLLM's engine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from .row_options import RowOptions

MASKED_LOGIT = -1e12
"""What the mask token's logit is set to: a prediction is never the mask (NVIDIA's value)."""


def suppress_mask_token(logits: Tensor, mask_token_id: int) -> None:
    """Makes the mask token impossible to predict, in place, in logits (T, V)."""
    logits[:, mask_token_id].fill_(MASKED_LOGIT)


def probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability (T,) of tokens (T,) under logits (T, V), neither tempered nor filtered."""
    return torch.exp(logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1))


def runner_up(logits: Tensor, logsumexp: Tensor, tokens: Tensor) -> Tensor:
    """The largest probability (T,) of another token than tokens (T,).

    Under logits (T, V), which are changed; their logsumexp is (T,).
    """
    return torch.exp(logits.scatter_(1, tokens[:, None], -torch.inf).amax(-1) - logsumexp)


def margin(logits: Tensor) -> Tensor:
    """Difference (T,) of the two largest probabilities under logits (T, V)."""
    best = torch.exp(logits.topk(2, -1).values - logits.logsumexp(-1, keepdim=True))
    return best[:, 0] - best[:, 1]


def temper_and_filter(logits: Tensor, options: RowOptions) -> Tensor:
    """Logits (T, V) divided by the temperature, with -inf where min-p, top-k or top-p drop a token, in this order.

    ``options`` has one entry a row; temperatures must be positive.
    """
    logits = logits / options.temperature[:, None]
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + options.min_p.log()[:, None], -torch.inf)
    return apply_top_k_top_p(logits, options.top_k, options.top_p)


def draw(logits: Tensor, number: Tensor) -> Tensor:
    """Draws a token (T,) for each row of fp32 logits (T, V), -inf for what is impossible.

    ``number`` (T,) is uniform in [0, 1): the draw inverts the cumulative distribution, so one number decides it.
    """
    cumulative = logits.softmax(-1).double().cumsum_(-1)
    target = number[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target has probability above zero.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
