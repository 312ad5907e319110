"""What greedy decoding asks of a row of logits, without a copy of it in fp32. T rows over a vocabulary V."""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(logits: Tensor, never: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The token (T,) int64 of the largest logit, the first of equal ones, that logit, and the logsumexp (T,) in fp32.

    Of logits (T, V), which may be changed: the token ``never`` becomes impossible. The logsumexp is NaN if a logit is.
    """
    logits = logits.float()
    if never is not None:
        logits[:, never].fill_(-torch.inf)
    largest, tokens = logits.max(-1)
    return tokens, largest, logits.logsumexp(-1)
