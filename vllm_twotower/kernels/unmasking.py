"""Which positions of a canvas are committed: the most confident ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def most_confident(confidence: Tensor, masked: Tensor, threshold: Tensor, step: Tensor, max_steps: Tensor) -> Tensor:
    """The k most confident of a row's n masked positions, of equal ones the first, as (R, S) bool.

    ``k = min(n, max(#(confidence > threshold), 1, ceil(n / (max_steps - step))))`` (TwoTower paper, arXiv 2606.26493).
    Args: confidence (R, S) fp32; masked (R, S) bool; threshold (R,) fp32; step and max_steps (R,) int64.
    """
    n = masked.sum(1)
    confident = ((confidence > threshold[:, None]) & masked).sum(1)
    k = torch.maximum(confident, at_least_to_finish(n, step, max_steps)).clamp(min=1)
    return most(confidence, masked, k)


def at_least_to_finish(n: Tensor, step: Tensor, max_steps: Tensor) -> Tensor:
    """``ceil(n / (max_steps - step))`` (R,): what a pass must commit of n masked positions to be done in time."""
    return -(-n // (max_steps - step).clamp(min=1))


def most(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """The k (R,) masked positions with the highest scores (R, S), as (R, S) bool; of equal ones the first."""
    order = score.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return (torch.empty_like(order).scatter_(1, order, ranks) < k[:, None]) & masked
