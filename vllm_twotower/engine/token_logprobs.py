"""Log-probabilities of requests' tokens, each from the pass that chose it, kept until the tokens are returned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import next_power_of_2
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs, compute_topk_scores

_NO_ID = -1


@dataclass
class ScoredTokens:
    """n tokens of a pass whose log-probabilities are to be kept.

    On the host: ``index`` (n,), where they lie among the pass's tokens, rising; ``slots`` (n,) and ``columns`` (n,),
    their requests and their places in the canvases. ``logits`` (n, V) fp32 are what they are scored under.
    """

    index: np.ndarray
    slots: np.ndarray
    columns: np.ndarray
    logits: Tensor

    def take(self, order: np.ndarray) -> ScoredTokens:
        """Some of them."""
        logits = self.logits[async_tensor_h2d(order, device=self.logits.device)]
        return ScoredTokens(self.index[order], self.slots[order], self.columns[order], logits)

    def replace(self, index: np.ndarray, logits: Tensor) -> None:
        """Scores the pass's tokens at ``index`` (m,), rising, under other logits (m, V)."""
        _, here, there = np.intersect1d(self.index, index, assume_unique=True, return_indices=True)
        device = logits.device
        self.logits[async_tensor_h2d(here, device=device)] = logits[async_tensor_h2d(there, device=device)]


class LogprobTable:
    """What the canvases of all requests that ask for log-probabilities know of their tokens so far.

    In vLLM's form: the token itself first, then the ``logprobs`` most probable ones or the ``logprob_token_ids``.
    Requests with about as many columns share a :class:`_Records`. ``has_logprobs`` (slots,) is on the host.
    """

    def __init__(self, num_slots: int, canvas_length: int, vocab_size: int, device: torch.device):
        self._shape, self._vocab_size, self._device = (num_slots, canvas_length), vocab_size, device
        self.has_logprobs = np.zeros(num_slots, dtype=bool)
        self._columns = np.zeros(num_slots, dtype=np.int64)  # of the request's records; 0: it has none
        self._records: dict[int, _Records] = {}

    def set(self, slot: int, params: SamplingParams) -> None:
        """Makes room for what a request's parameters ask for."""
        if columns := int(self._columns[slot]):
            self._records[columns].remove(slot)
            if not len(self._records[columns]):
                del self._records[columns]
        self._columns[slot] = 0
        self.has_logprobs[slot] = params.num_logprobs is not None
        if self.has_logprobs[slot]:
            ids = params.logprob_token_ids or []
            num_top = 0 if ids else self._vocab_size if params.logprobs == -1 else params.logprobs
            columns = min(next_power_of_2(max(1, len(ids), num_top)), self._vocab_size)
            if columns not in self._records:
                self._records[columns] = _Records(*self._shape, columns, self._device)
            self._columns[slot] = columns
            self._records[columns].add(slot, num_top, ids)

    def record(self, scored: ScoredTokens, chosen: Tensor, tokens: Tensor, as_logits: bool) -> None:
        """Notes of a pass's ``tokens`` (T,) those that are to be scored, where ``chosen`` (T,) is true.

        ``as_logits`` keeps the logits themselves, as vLLM's ``logprobs_mode`` may ask.
        """
        kind = self._columns[scored.slots]
        for key in np.unique(kind).tolist():
            some = scored if (kind == key).all() else scored.take(np.flatnonzero(kind == key))
            index = async_tensor_h2d(some.index, device=self._device)
            self._records[key].record(some, chosen[index], tokens[index], as_logits)

    def collect(self, slots: np.ndarray, num_tokens: np.ndarray) -> LogprobsTensors | None:
        """vLLM's form of the log-probabilities that a step returns; None if it returns none.

        ``num_tokens`` (rows,) are the tokens that the requests in ``slots`` (rows,) return.
        """
        counts = np.where(self.has_logprobs[slots], num_tokens, 0)
        total = int(counts.sum())
        if not total:
            return None
        starts = np.cumsum(counts) - counts
        row = np.repeat(np.arange(len(slots)), counts)
        column = np.arange(total) - starts[row]
        kind = self._columns[slots[row]]
        width = 1 + int(kind.max())
        ids = torch.zeros(total, width, dtype=torch.int64, device=self._device)
        values = torch.full((total, width), -torch.inf, device=self._device)
        ranks = torch.zeros(total, dtype=torch.int64, device=self._device)
        for key in np.unique(kind).tolist():
            of_kind = np.flatnonzero(kind == key)
            records, place = self._records[key], async_tensor_h2d(of_kind, device=self._device)
            at = records.at(slots[row[of_kind]], column[of_kind])
            ids[place, : 1 + key], values[place, : 1 + key] = records.ids[at], records.values[at]
            ranks[place] = records.ranks[at]
        return LogprobsTensors(ids, values, ranks, cu_num_generated_tokens=[*np.where(counts, starts, 0).tolist(), 0])


class _Records:
    """The records of the requests that have up to ``columns`` tokens beside each chosen one.

    A request has a row of ``ids`` and ``values`` (rows, S, 1 + columns), and ``ranks`` (rows, S).
    """

    def __init__(self, num_slots: int, canvas_length: int, columns: int, device: torch.device):
        self._row = np.full(num_slots, -1, dtype=np.int64)
        self._num_top = np.zeros(num_slots, dtype=np.int64)
        self.ids = torch.zeros(0, canvas_length, 1 + columns, dtype=torch.int64, device=device)
        self.values = torch.zeros(0, canvas_length, 1 + columns, device=device)
        self.ranks = torch.zeros(0, canvas_length, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(0, columns, dtype=torch.int64, device=device)  # _NO_ID: the most probable ones

    def __len__(self) -> int:
        return int((self._row >= 0).sum())

    def remove(self, slot: int) -> None:
        self._row[slot] = -1

    def add(self, slot: int, num_top: int, token_ids: list[int]) -> None:
        row = int(np.setdiff1d(np.arange(len(self.ids) + 1), self._row)[0])
        if row == len(self.ids):
            more = max(1, row)
            self.ids, self.values = (F.pad(table, (0, 0, 0, 0, 0, more)) for table in (self.ids, self.values))
            self.ranks, self._token_ids = (F.pad(table, (0, 0, 0, more)) for table in (self.ranks, self._token_ids))
        self._row[slot], self._num_top[slot] = row, num_top
        self._token_ids[row] = _NO_ID
        self._token_ids[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)

    def at(self, slots: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor]:
        """Index of tokens at ``columns`` (n,) in the canvases of the requests in ``slots`` (n,)."""
        device = self.ids.device
        return async_tensor_h2d(self._row[slots], device=device), async_tensor_h2d(columns, device=device)

    def record(self, scored: ScoredTokens, chosen: Tensor, tokens: Tensor, as_logits: bool) -> None:
        """See :meth:`LogprobTable.record`; ``chosen`` (n,) and ``tokens`` (n,) are those of ``scored``."""
        slots, logits = scored.slots, scored.logits
        at, num_top = self.at(slots, scored.columns), int(self._num_top[slots].max())
        scores = compute_topk_scores(logits, num_top, tokens, logits_mode=as_logits)
        ids, values = scores.logprob_token_ids, scores.logprobs
        if not self._num_top[slots].all():
            wanted = self._token_ids[at[0]]
            ids = F.pad(ids, (0, wanted.shape[1] - num_top))
            ids[:, 1:] = torch.where(wanted == _NO_ID, ids[:, 1:], wanted)
            values = logits.gather(1, ids).float() if as_logits else compute_token_logprobs(logits, ids)
        kept = slice(ids.shape[1])
        self.ids[(*at, kept)] = torch.where(chosen[:, None], ids, self.ids[at][:, kept])
        self.values[(*at, kept)] = torch.where(chosen[:, None], values, self.values[at][:, kept])
        self.ranks[at] = torch.where(chosen, scores.selected_token_ranks, self.ranks[at])
