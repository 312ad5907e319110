"""What decoding asks of rows of logits, without a copy of them in fp32 or a sorted one. T rows over a vocabulary V.

Logits may be changed: the token ``never`` becomes impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(
    logits: Tensor, never: int | None = None, needs_second: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The token (T,) int64 of the largest logit, the first of equal ones, that logit, the logsumexp, and the second.

    Of logits (T, V); the last three (T,) in fp32, the second largest logit only where it is needed, else (0,). The
    logsumexp is NaN if a logit is.
    """
    logits = _without(logits.float(), never)
    largest, tokens = logits.max(-1)
    second = logits.scatter(1, tokens[:, None], -torch.inf).amax(-1) if needs_second else largest[:0]
    return tokens, largest, logits.logsumexp(-1), second


def masses(logits: Tensor, largest: Tensor, temperature: Tensor, never: int | None = None) -> Tensor:
    """``exp((logit - largest) / temperature)``, summed over consecutive parts of the vocabulary, as many as suit.

    Args: logits (T, V); largest (T,) fp32, of each row; temperature (T,) fp32, positive. Returns (T, parts) fp64.
    """
    return _tempered(logits, largest, temperature, never).sum(-1, keepdim=True)


def drawn(
    logits: Tensor, parts: Tensor, largest: Tensor, temperature: Tensor, target: Tensor, never: int | None = None
) -> tuple[Tensor, Tensor]:
    """The first token (T,) int64 up to which there is more mass than the target, and its logit (T,) fp32.

    Args: parts (T, parts), the :func:`masses` of the same logits, largest and temperature; target (T,) fp64. For one
    that is too large, by rounding or because another shard has the token, some token.
    """
    cumulative = _tempered(logits, largest, temperature, never).cumsum_(-1)
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], logits.gather(1, tokens)[:, 0].float()


def _tempered(logits: Tensor, largest: Tensor, temperature: Tensor, never: int | None) -> Tensor:
    values = (_without(logits.float(), never) - largest[:, None]) / temperature[:, None]
    return values.exp_().double()


def _without(logits: Tensor, never: int | None) -> Tensor:
    if never is not None:
        logits[:, never].fill_(-torch.inf)
    return logits
