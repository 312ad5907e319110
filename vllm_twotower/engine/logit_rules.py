"""What a request's sampling parameters do to logits before a token is chosen: bias, bans, penalties.

In a block every position is treated as the next token is in an autoregressive model, except that what stands around it
counts on both sides: tokens emitted before, and positions of the block that earlier passes have decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

UNDECIDED = -1
"""Stands for a position without a token."""
_IMPOSSIBLE = -1e11
"""Below the logit of any token that can be chosen, above that of the suppressed mask token."""


@dataclass
class Text:
    """The tokens of a request on the device: ``prompt`` (P,) and ``output`` (N,), and what stands after them.

    ``ahead`` (n,) are the positions to predict: decided tokens and ``UNDECIDED``.
    """

    prompt: Tensor
    output: Tensor
    ahead: Tensor


@dataclass
class LogitRules:
    """The rules of one request.

    ``bias`` (V,) fp32 is added everywhere (-inf for what is never allowed), ``stop_ids`` are impossible before output
    position ``min_tokens``, ``phrases`` are banned sequences of two and more tokens.
    """

    bias: Tensor | None
    min_tokens: int
    stop_ids: Tensor
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    phrases: list[Tensor]

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int, device: torch.device) -> LogitRules | None:
        """The rules that a request's parameters ask for; None if there are none."""
        bad_words = params.bad_words_token_ids or []
        bias = None
        if params.allowed_token_ids or params.logit_bias or any(len(word) == 1 for word in bad_words):
            bias = torch.zeros(vocab_size)
            if params.allowed_token_ids:
                bias.fill_(-torch.inf)[params.allowed_token_ids] = 0
            for token, value in (params.logit_bias or {}).items():
                bias[token] += value
            bias[[word[0] for word in bad_words if len(word) == 1]] = -torch.inf
            bias = bias.to(device)
        stop_ids = sorted(params.all_stop_token_ids) if params.min_tokens else []
        rules = cls(
            bias=bias,
            min_tokens=params.min_tokens if stop_ids else 0,
            stop_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device),
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            phrases=[torch.tensor(word, device=device) for word in bad_words if len(word) > 1],
        )
        return rules if bias is not None or stop_ids or rules.penalises or rules.phrases else None

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def apply(self, logits: Tensor, text: Text) -> None:
        """Changes fp32 logits (n, V) of the positions ``text.ahead`` in place.

        Where the rules leave no token they are waived: some token has to stand there.
        """
        free = logits.clone()
        if self.bias is not None:
            logits += self.bias
        if (too_early := self.min_tokens - len(text.output)) > 0:
            logits[:too_early].index_fill_(1, self.stop_ids, -torch.inf)
        if self.penalises:
            self._penalise(logits, text)
        for phrase in self.phrases:
            _forbid_completion(logits, phrase, text)
        waived = logits.amax(-1, keepdim=True) < _IMPOSSIBLE
        torch.where(waived, free, logits, out=logits)

    def _penalise(self, logits: Tensor, text: Text) -> None:
        """vLLM's formulas (``vllm/v1/worker/gpu/sample/penalties.py``), counting decided positions as output."""
        vocab_size = logits.shape[1]
        decided = text.ahead != UNDECIDED
        counts = logits.new_zeros(vocab_size)
        counts.index_add_(0, text.output, counts.new_ones(len(text.output)))
        counts.index_add_(0, text.ahead.clamp(min=0), decided.to(counts.dtype))
        if self.repetition_penalty != 1:
            seen = counts > 0
            seen[text.prompt] = True
            scaled = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            torch.where(seen, scaled, logits, out=logits)
        logits -= self.frequency_penalty * counts + self.presence_penalty * (counts > 0)

    def hold_back(self, text: Text, new: Tensor, confidence: Tensor) -> Tensor:
        """The positions of ``new`` (n,) bool that may be committed together.

        ``text.ahead`` has the new tokens in it. Where they make up a banned phrase only the most confident of them
        stays, ``confidence`` (n,) being theirs; the phrase is then completed by no later pass, see :meth:`apply`.
        """
        allowed = new
        for phrase in self.phrases:
            windows, place = _windows(phrase, text)
            if not len(windows):
                continue
            fresh = (place >= 0) & new[place.clamp(min=0)]
            best = confidence[place.clamp(min=0)].masked_fill(~fresh, -1).argmax(1, keepdim=True)
            surplus = fresh & (windows == phrase).all(1, keepdim=True)
            surplus &= torch.arange(len(phrase), device=new.device) != best
            taken = torch.zeros_like(new, dtype=torch.int32)
            taken.index_put_((place.clamp(min=0),), surplus.int(), accumulate=True)
            allowed = allowed & (taken == 0)
        return allowed


def _windows(phrase: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """Where a phrase (L,) could stand in the output: windows (m, L) of tokens and their places (m, L) in ``ahead``.

    Places before ``ahead`` are negative.
    """
    tail = text.output[max(0, len(text.output) - len(phrase) + 1) :]
    tokens = torch.cat((tail, text.ahead))
    place = torch.arange(len(tokens), device=tokens.device) - len(tail)
    if len(tokens) < len(phrase):
        return tokens.new_empty(0, len(phrase)), place.new_empty(0, len(phrase))
    return tokens.unfold(0, len(phrase), 1), place.unfold(0, len(phrase), 1)


def _forbid_completion(logits: Tensor, phrase: Tensor, text: Text) -> None:
    """Makes impossible, in logits (n, V), the one token that would complete the phrase where all others stand."""
    windows, place = _windows(phrase, text)
    missing = windows != phrase
    completes = missing & (missing.sum(1, keepdim=True) == 1) & (windows == UNDECIDED)
    change = torch.zeros_like(windows, dtype=logits.dtype).masked_fill_(completes, -torch.inf)
    logits.index_put_((place.clamp(min=0), phrase.expand_as(windows)), change, accumulate=True)
