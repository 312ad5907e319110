"""What the model hands to the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from vllm_twotower.kernels import drawn, masses, row_statistics

from .context import Scanned


@dataclass
class Chosen:
    """The most probable or drawn ``tokens`` (T,) int64 of T rows and their probability, ``confidence`` (T,) fp32.

    ``runner_up`` gives the largest probability (T,) fp32 of another token, if it was asked for.
    """

    tokens: Tensor
    confidence: Tensor
    runner_up: Callable[[], Tensor] | None = None


@dataclass
class Draw:
    """How T rows draw: ``temperature`` (T,) fp32, 0 for the most probable token, and ``number`` (T,) fp64 in [0, 1)."""

    temperature: Tensor
    number: Tensor


class OutputHead:
    """An output head whose vocabulary is sharded over the tensor-parallel ranks."""

    def __init__(self, weights: ParallelLMHead, processor: LogitsProcessor):
        self._weights, self._processor, self.num_shards = weights, processor, weights.tp_size
        self.chooses = weights.tp_size > 1 or not current_platform.is_cpu()
        """Whether :meth:`choose` costs less than whole rows: no logits are gathered, or there are kernels for it."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """All logits (T, V) of hidden states (T, H), on every rank."""
        return self._processor(self._weights, hidden)

    def choose(
        self, hidden: Tensor, never: int | None = None, draw: Draw | None = None, needs_runner_up: bool = False
    ) -> Chosen:
        """Tokens of hidden states (T, H), without the logits; ``never`` is not predicted.

        Ranks exchange three numbers a row: the largest logit of their shard, its token and the shard's logsumexp; for
        runners-up also the second logit; and for draws its mass, then a token and its logit. All get the same result,
        of equal logits the first token.
        """
        shard = self._weights.shard_indices
        start = shard.org_vocab_start_index
        logits = self._processor(self._weights, hidden, skip_gather=True)[:, : shard.num_org_elements]
        is_here = never is not None and start <= never < shard.org_vocab_end_index
        never = never - start if is_here else None
        tokens, ours, logsumexp, second = row_statistics(logits, never, needs_runner_up)
        best, of_shards = ours, [ours[None], second[None]]
        if self._weights.tp_size > 1:
            seconds = [second] if needs_runner_up else []
            largest, logsumexp, token, *seconds = self._gathered(ours, logsumexp, (tokens + start).int(), *seconds)
            of_shards = [largest, *seconds]
            best, logsumexp = largest.amax(0), logsumexp.logsumexp(0)
            tokens = token.masked_fill(largest != best, self._weights.org_vocab_size - 1).amin(0).long()
        if draw is not None:
            is_drawn = draw.temperature > 0
            token, logit = self._drawn(logits, ours, best, draw, never)
            tokens, best = torch.where(is_drawn, token, tokens), torch.where(is_drawn, logit, best)
        chosen = Chosen(tokens, torch.exp(best - logsumexp))
        if needs_runner_up:
            chosen.runner_up = partial(_runner_up, of_shards, best, logsumexp)
        return chosen

    def _drawn(
        self, logits: Tensor, ours: Tensor, best: Tensor, draw: Draw, never: int | None
    ) -> tuple[Tensor, Tensor]:
        """Drawn tokens (T,) and their logits (T,), by one number for the shards one after the other.

        ``ours`` (T,) are the largest logits of this shard, ``best`` (T,) those of all.
        """
        temperature = torch.where(draw.temperature > 0, draw.temperature, 1.0)
        parts = masses(logits, ours, temperature, never)
        if self._weights.tp_size == 1:
            return drawn(logits, parts, ours, temperature, draw.number * parts.sum(1), never)
        to_best = torch.exp((ours - best) / temperature).double()
        (mass,) = self._gathered(parts.sum(1) * to_best)
        cumulative = mass.cumsum(0)
        target = draw.number * cumulative[-1]
        before = (cumulative - mass)[self._weights.tp_rank]
        token, logit = drawn(logits, parts, ours, temperature, (target - before) / to_best, never)
        token += self._weights.shard_indices.org_vocab_start_index
        token, logit = self._gathered(token.int(), logit)
        owner = (cumulative <= target).sum(0, keepdim=True).clamp_(max=len(mass) - 1)
        return token.gather(0, owner)[0].long(), logit.gather(0, owner)[0]

    def _gathered(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Values (T,) of all ranks, as (ranks, T)."""
        # As fp32 whatever they are: ranks on CPUs exchange nothing else.
        columns = [value[:, None].view(torch.float32) for value in values]
        ours = torch.cat(columns, 1)
        ranks = tensor_model_parallel_all_gather(ours, dim=0).view(-1, *ours.shape)
        parts = ranks.split([column.shape[1] for column in columns], -1)
        return tuple(part.contiguous().view(value.dtype)[..., 0] for part, value in zip(parts, values, strict=True))


def _runner_up(of_shards: Sequence[Tensor], chosen: Tensor, logsumexp: Tensor) -> Tensor:
    """From the two largest logits of every shard, (shards, T) each, the ``chosen`` token's and all logsumexp (T,)."""
    first, second = torch.cat(list(of_shards)).topk(2, 0).values
    return torch.exp(torch.where(chosen < first, first, second) - logsumexp)


@dataclass
class StepLogits:
    """Hidden states of a step, and the heads that make logits of them, a tile at a time.

    ``context`` (A, H) are those of the rows whose next token the context head gives, ``drafts`` (T, H) those of drafts
    which the context tower has read, ``denoiser`` (T, H) those of the canvas tokens. Logits of all of these at once
    would be the largest tensors of the engine.
    ``grammar`` holds, for requests with structured outputs, their ids and a bitmask (requests, V / 32) int32 of the
    tokens that may come next.
    """

    context: Tensor | None
    drafts: Tensor | None
    denoiser: Tensor | None
    context_head: OutputHead
    denoiser_head: OutputHead | None
    tile: int
    """The most rows whose logits the sampler may ask for at once."""
    grammar: tuple[Sequence[str], np.ndarray] | None = None
    kept: Sequence[Scanned] = ()
    """While memory is profiled, as much as Mamba layers keep of drafts until these are verified."""

    @property
    def shape(self) -> tuple[int]:
        """The number of logit rows: vLLM's runner applies a grammar if there are any."""
        return (sum(len(hidden) for hidden in (self.context, self.drafts, self.denoiser) if hidden is not None),)


def logit_rows_per_tile(vocab_size: int, canvas_length: int, max_bytes: int = 256 << 20) -> int:
    """Rows of fp32 logits that ``max_bytes`` hold, and at least one canvas."""
    return max(canvas_length, max_bytes // (4 * vocab_size))
