"""The block sampler's arithmetic: pure functions of logits, canvases and per-row options, over all rows at once.

R canvases of at most S positions, T positions in all, vocabulary V. Nothing here knows of vLLM's engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from .request_table import RowOptions

MASKED_LOGIT = -1e12
"""What the mask token's logit is set to: a prediction is never the mask (NVIDIA's value)."""

Strategy = Callable[[Tensor, Tensor, Tensor, RowOptions], Tensor]
"""(confidence (R, S), masked (R, S) bool, step (R,), options) -> positions to commit (R, S) bool."""


def confidence_unmasking(confidence: Tensor, masked: Tensor, step: Tensor, options: RowOptions) -> Tensor:
    """Commits the k most confident of a row's n masked positions (TwoTower paper, arXiv 2606.26493).

    ``k = min(n, max(#(confidence > threshold), 1, ceil(n / (max_steps - step))))``: the last step commits all. Of
    equally confident positions the first goes first.
    """
    n = masked.sum(1)
    confident = ((confidence > options.confidence_threshold[:, None]) & masked).sum(1)
    steps_left = (options.max_steps - step).clamp(min=1)
    k = torch.minimum(n, torch.maximum(confident, -(-n // steps_left)).clamp(min=1))
    order = confidence.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank < k[:, None]


STRATEGIES: dict[str, Strategy] = {"confidence_unmasking": confidence_unmasking}


def uniform(seed: Tensor, *counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and the counters alone: a hash, not a stream.

    Arguments are int64 and broadcast; the result is fp64. Each counter is mixed in with the finaliser of SplitMix64
    (Steele, Lea and Flood, OOPSLA 2014), in int64 arithmetic that wraps around.
    """
    state = _mix(seed)
    for counter in counters:
        state = _mix(state + counter * -7046029254386353131)  # 0x9E3779B97F4A7C15
    return _logical_shift(state, 11).double() * 2.0**-53


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _logical_shift(x, 31)


def suppress_mask_token(logits: Tensor, mask_token_id: int) -> None:
    """Makes the mask token impossible to predict, in place, in logits (T, V)."""
    logits[:, mask_token_id] = MASKED_LOGIT


def predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The arg max (T,) of logits (T, V) and its probability (T,) in fp32."""
    best, prediction = logits.max(-1)
    return prediction, torch.exp(best - logits.logsumexp(-1))


def draw(logits: Tensor, options: RowOptions, number: Tensor) -> Tensor:
    """Draws a token (T,) for each row of fp32 logits (T, V) from the tempered, filtered distribution.

    ``options`` has one entry a row, ``number`` (T,) is uniform in [0, 1): the draw inverts the cumulative
    distribution, so one number decides it. Temperatures must be positive.
    """
    logits = logits / options.temperature[:, None]
    logits = apply_top_k_top_p(logits, options.top_k, options.top_p)
    probabilities = logits.softmax(-1)
    threshold = options.min_p[:, None] * probabilities.amax(-1, keepdim=True)
    cumulative = probabilities.masked_fill_(probabilities < threshold, 0).double().cumsum_(-1)
    target = number[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target has probability above zero.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability (T,) of tokens (T,) under logits (T, V), neither tempered nor filtered."""
    return torch.exp(logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1))
