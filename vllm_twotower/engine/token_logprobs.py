"""Log-probabilities of a request's tokens, each from the pass that chose it, kept until the token is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs, compute_topk_scores


class TokenLogprobs:
    """What one request's canvas of ``width`` positions knows of its tokens so far.

    In vLLM's form: the token itself first, then the ``logprobs`` most probable ones or the ``logprob_token_ids``.
    """

    def __init__(self, params: SamplingParams, width: int, vocab_size: int, device: torch.device):
        ids = params.logprob_token_ids
        self.token_ids = torch.tensor(ids, dtype=torch.int64, device=device) if ids else None
        self.num_top = 0 if ids else vocab_size if params.logprobs == -1 else params.logprobs
        columns = 1 + (len(ids) if ids else self.num_top)
        self.ids = torch.zeros(width, columns, dtype=torch.int64, device=device)
        self.values = torch.zeros(width, columns, dtype=torch.float32, device=device)
        self.ranks = torch.zeros(width, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, params: SamplingParams, width: int, vocab_size: int, device: torch.device) -> TokenLogprobs | None:
        """The record that a request's parameters ask for; None if they ask for none."""
        return None if params.num_logprobs is None else cls(params, width, vocab_size, device)

    def record(self, chosen: Tensor, logits: Tensor, tokens: Tensor, as_logits: bool) -> None:
        """Notes tokens (n,) under logits (n, V) at the positions where ``chosen`` (n,) is true.

        ``as_logits`` keeps the logits themselves, as vLLM's ``logprobs_mode`` may ask.
        """
        n = len(tokens)
        scores = compute_topk_scores(logits, self.num_top, tokens, logits_mode=as_logits)
        ids, values = scores.logprob_token_ids, scores.logprobs
        if self.token_ids is not None:
            ids = torch.cat((ids, self.token_ids.expand(n, -1)), 1)
            values = logits.gather(1, ids).float() if as_logits else compute_token_logprobs(logits, ids)
        torch.where(chosen[:, None], ids, self.ids[:n], out=self.ids[:n])
        torch.where(chosen[:, None], values, self.values[:n], out=self.values[:n])
        torch.where(chosen, scores.selected_token_ranks, self.ranks[:n], out=self.ranks[:n])


def collect(records: Mapping[int, TokenLogprobs], num_tokens: Sequence[int]) -> LogprobsTensors | None:
    """vLLM's form of the log-probabilities that a step returns; None if it returns none.

    ``num_tokens`` are the tokens each batch row returns, ``records`` those of the rows that ask for log-probabilities.
    """
    rows = [(row, records[row]) for row in sorted(records) if num_tokens[row]]
    if not rows:
        return None
    columns = max(record.ids.shape[1] for _, record in rows)
    starts, total = [0] * (len(num_tokens) + 1), 0
    for row, _ in rows:
        starts[row] = total
        total += num_tokens[row]
    return LogprobsTensors(
        torch.cat([F.pad(record.ids[: num_tokens[row]], (0, columns - record.ids.shape[1])) for row, record in rows]),
        torch.cat(
            [
                F.pad(record.values[: num_tokens[row]], (0, columns - record.values.shape[1]), value=-torch.inf)
                for row, record in rows
            ]
        ),
        torch.cat([record.ranks[: num_tokens[row]] for row, record in rows]),
        cu_num_generated_tokens=starts,
    )
