"""What requests' sampling parameters do to logits before a token is chosen: bias, bans, penalties.

In a block every position is treated as the next token is in an autoregressive model, except that what stands around it
counts on both sides: tokens emitted before, and positions of the block that earlier passes have decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.sampling_params import SamplingParams

UNDECIDED = -1
"""Stands for a position without a token."""
NOTHING = -2
"""Stands where there is no position: before the output, and behind a shorter block."""
_IMPOSSIBLE = -1e11
"""Below the logit of any token that can be chosen, above that of the suppressed mask token."""


@dataclass
class RuledRows:
    """R rows of a pass that have rules, and their n tokens.

    ``host_slots`` (R,) are on the host. On the device: ``slots`` (R,); ``of_pass`` (R,), which of the pass's rows they
    are; ``text`` (R, L), the requests' tokens; ``prompt_lens`` (R,) and ``starts`` (R,), the position of the first one
    to predict; ``ahead`` (R, S), what stands from there on: decided tokens, ``UNDECIDED``, ``NOTHING``; and for each of
    the n tokens its ``row`` and ``column`` there, and its ``index`` among the pass's logits.
    """

    host_slots: np.ndarray
    slots: Tensor
    of_pass: Tensor
    text: Tensor
    prompt_lens: Tensor
    starts: Tensor
    ahead: Tensor
    row: Tensor
    column: Tensor
    index: Tensor

    def before(self, count: int) -> Tensor:
        """The last ``count`` tokens (R, count) of the output so far."""
        position = self.starts[:, None] + torch.arange(-count, 0, device=self.starts.device)
        tokens = self.text.gather(1, position.clamp(min=0)).long()
        return tokens.masked_fill(position < self.prompt_lens[:, None], NOTHING)


class RuleTable:
    """The rules of all requests by slot, and their application to many rows at once.

    ``has_rules`` and ``has_phrases`` (slots,) are on the host. A row of ``bias`` (n, V) fp32 is added to a request's
    logits, -inf for what is never allowed; row 0 is zero, for those without. ``stop_ids`` (slots, k) are impossible
    before output position ``min_tokens``. ``phrases`` (slots, p, L) are banned sequences of two and more tokens, at the
    right end, with ``NOTHING`` before them. Tables grow when a request needs more than they have.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self.has_rules = np.zeros(num_slots, dtype=bool)
        self._has_stop_ids = np.zeros(num_slots, dtype=bool)
        self._penalises = np.zeros(num_slots, dtype=bool)
        self.has_phrases = np.zeros(num_slots, dtype=bool)
        self._bias_row = np.zeros(num_slots, dtype=np.int64)
        self._bias = torch.zeros(1, vocab_size, device=device)
        self._bias_row_of_slot = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._min_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.full((num_slots, 1), NOTHING, device=device)
        self._phrases = torch.full((num_slots, 1, 2), NOTHING, device=device)
        self._penalties = torch.zeros(3, num_slots, device=device)

    def set(self, slot: int, params: SamplingParams) -> None:
        """Takes a request's rules from its parameters."""
        words = params.bad_words_token_ids or []
        phrases = [word for word in words if len(word) > 1]
        stop_ids = sorted(params.all_stop_token_ids) if params.min_tokens else []
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._has_stop_ids[slot] = bool(stop_ids)
        self.has_phrases[slot] = bool(phrases)
        self._penalises[slot] = penalties != (1, 0, 0)
        self._set_bias(slot, params, [word[0] for word in words if len(word) == 1])
        self._min_tokens[slot] = params.min_tokens
        self._penalties[:, slot] = torch.tensor(penalties)
        if stop_ids:
            self._stop_ids = _at_least(self._stop_ids, len(stop_ids))
            self._stop_ids[slot] = NOTHING
            self._stop_ids[slot, : len(stop_ids)] = torch.tensor(stop_ids)
        if phrases:
            self._phrases = _at_least(self._phrases, len(phrases), max(map(len, phrases)))
        self._phrases[slot] = NOTHING
        for i, phrase in enumerate(phrases):
            self._phrases[slot, i, -len(phrase) :] = torch.tensor(phrase)
        kinds = (self._has_stop_ids, self.has_phrases, self._penalises, self._bias_row)
        self.has_rules[slot] = any(kind[slot] for kind in kinds)

    def _set_bias(self, slot: int, params: SamplingParams, banned: list[int]) -> None:
        self._bias_row[slot] = 0
        if params.allowed_token_ids or params.logit_bias or banned:
            bias = torch.zeros(self._vocab_size)
            if params.allowed_token_ids:
                bias.fill_(-torch.inf)[params.allowed_token_ids] = 0
            for token, value in (params.logit_bias or {}).items():
                bias[token] += value
            bias[banned] = -torch.inf
            free = np.setdiff1d(np.arange(1, len(self._bias)), self._bias_row)
            if not len(free):
                free = np.array([len(self._bias)])
                self._bias = F.pad(self._bias, (0, 0, 0, len(self._bias)))
            self._bias_row[slot] = free[0]
            self._bias[free[0]] = bias.to(self._device)
        self._bias_row_of_slot[slot] = int(self._bias_row[slot])

    def apply(self, all_logits: Tensor, rows: RuledRows) -> None:
        """Changes the fp32 logits (T, V) of a pass in place where its tokens have rules.

        Where the rules leave no token they are waived: some token has to stand there.
        """
        free = all_logits[rows.index]
        logits = free.clone()
        slots, host_slots = rows.slots, rows.host_slots
        if self._bias_row[host_slots].any():
            logits += self._bias[self._bias_row_of_slot[slots]][rows.row]
        if self._has_stop_ids[host_slots].any():
            output_position = (rows.starts - rows.prompt_lens)[rows.row] + rows.column
            too_early = output_position < self._min_tokens[slots][rows.row]
            stop_ids = self._stop_ids[slots][rows.row]
            token = torch.arange(len(logits), device=logits.device)[:, None]
            _forbid(logits, token.expand_as(stop_ids), stop_ids, too_early[:, None])
        if self._penalises[host_slots].any():
            self._penalise(logits, rows)
        if self.has_phrases[host_slots].any():
            self._forbid_completions(logits, rows)
        all_logits[rows.index] = torch.where(logits.amax(-1, keepdim=True) < _IMPOSSIBLE, free, logits)

    def _penalise(self, logits: Tensor, rows: RuledRows) -> None:
        """vLLM's formulas (``vllm/v1/worker/gpu/sample/penalties.py``), counting decided positions as output."""
        num_rows = len(rows.slots)
        text = rows.text.long()
        position = torch.arange(text.shape[1], device=text.device)
        in_prompt = position < rows.prompt_lens[:, None]
        in_output = (position < rows.starts[:, None]) & ~in_prompt
        counts = logits.new_zeros(num_rows, self._vocab_size)
        for tokens, counted in ((text, in_output), (rows.ahead, rows.ahead >= 0)):
            counts.scatter_add_(1, torch.where(counted, tokens, 0), counted.to(counts.dtype))
        occurs = counts.clone().scatter_add_(1, torch.where(in_prompt, text, 0), in_prompt.to(counts.dtype)) > 0
        repetition, frequency, presence = self._penalties[:, rows.slots].unsqueeze(2)
        factor = torch.where(occurs, repetition, 1.0)[rows.row]
        torch.where(logits > 0, logits / factor, logits * factor, out=logits)
        logits -= (frequency * counts + presence * (counts > 0))[rows.row]

    def _forbid_completions(self, logits: Tensor, rows: RuledRows) -> None:
        """Makes impossible the one token that would complete a phrase where all others stand."""
        phrases, windows, place = self._windows(rows)
        missing = (windows != phrases) & (phrases != NOTHING)
        completes = missing & (missing.sum(-1, keepdim=True) == 1) & (windows == UNDECIDED)
        token_at = logits.new_zeros(rows.ahead.shape, dtype=torch.int64)
        token_at[rows.row, rows.column] = torch.arange(len(logits), device=logits.device)
        row = torch.arange(len(rows.slots), device=logits.device)[:, None, None, None]
        _forbid(logits, token_at[row, place.clamp(min=0)].expand_as(completes), phrases.expand_as(completes), completes)

    def hold_back(self, new: Tensor, confidence: Tensor, rows: RuledRows) -> Tensor:
        """The positions of ``new`` (R, S) bool that may be committed together.

        ``rows.ahead`` has the new tokens in it. Where they make up a banned phrase only the most confident of them
        stays, ``confidence`` (R, S) being theirs; the phrase is then completed by no later pass, see :meth:`apply`.
        """
        phrases, windows, place = self._windows(rows)
        row = torch.arange(len(new), device=new.device)[:, None, None, None]
        within = place.clamp(min=0)
        fresh = new[row, within] & (place >= 0) & (phrases != NOTHING)
        stands = (windows == phrases) | (phrases == NOTHING)
        complete = stands.all(-1, keepdim=True) & (phrases != NOTHING).any(-1, keepdim=True)
        best = confidence[row, within].masked_fill(~fresh, -1).argmax(-1, keepdim=True)
        surplus = fresh & complete & (torch.arange(windows.shape[-1], device=new.device) != best)
        held = torch.zeros_like(new, dtype=torch.int32)
        held.index_put_((row.expand_as(surplus), within.expand_as(surplus)), surplus.int(), accumulate=True)
        return new & (held == 0)

    def _windows(self, rows: RuledRows) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows' phrases could end: phrases (R, p, 1, L), windows (R, 1, S, L) of tokens, and places (S, L).

        A place is a column of ``ahead``, negative before it.
        """
        phrases = self._phrases[rows.slots].unsqueeze(2)
        before = phrases.shape[-1] - 1
        tokens = torch.cat((rows.before(before), rows.ahead), 1)
        place = torch.arange(-before, rows.ahead.shape[1], device=tokens.device)
        length = phrases.shape[-1]
        return phrases, tokens.unfold(1, length, 1).unsqueeze(1), place.unfold(0, length, 1)


def _at_least(table: Tensor, *sizes: int) -> Tensor:
    """The table, its last dimensions widened to at least ``sizes``: phrases stay at the right end."""
    widths = [max(0, size - have) for size, have in zip(sizes, table.shape[-len(sizes) :], strict=True)]
    padding = [widths[-1], 0, 0, widths[0]] if len(sizes) == 2 else [0, widths[0]]
    return F.pad(table, padding, value=NOTHING)


def _forbid(logits: Tensor, index: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Makes ``tokens`` impossible in the rows ``index`` of logits (n, V) where ``where`` says so.

    Does not ask the device how many those are. ``index`` and ``tokens`` have the same shape.
    """
    change = torch.zeros(tokens.shape, device=logits.device).masked_fill(where & (tokens >= 0), -torch.inf)
    logits.index_put_((index, tokens.clamp(min=0)), change, accumulate=True)
