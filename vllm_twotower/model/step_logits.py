"""What the model hands to the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from vllm_twotower.kernels import row_statistics

from .context import Scanned


@dataclass
class Best:
    """The most probable ``tokens`` (T,) int64 of T rows and their probability, ``confidence`` (T,) fp32."""

    tokens: Tensor
    confidence: Tensor


class OutputHead:
    """An output head whose vocabulary is sharded over the tensor-parallel ranks."""

    def __init__(self, weights: ParallelLMHead, processor: LogitsProcessor):
        self._weights, self._processor = weights, processor
        self.gives_best = weights.tp_size > 1 or not current_platform.is_cpu()
        """Whether :meth:`best` costs less than whole rows: nothing is gathered, or there is a kernel for it."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """All logits (T, V) of hidden states (T, H), on every rank."""
        return self._processor(self._weights, hidden)

    def best(self, hidden: Tensor, never: int | None = None) -> Best:
        """What greedy decoding asks for, of hidden states (T, H), without the logits; ``never`` is not predicted.

        Ranks exchange three numbers a row: the largest logit of their shard, its token and the shard's logsumexp. All
        get the same result, of equal logits the first token, as with one rank.
        """
        shard = self._weights.shard_indices
        start = shard.org_vocab_start_index
        logits = self._processor(self._weights, hidden, skip_gather=True)[:, : shard.num_org_elements]
        is_here = never is not None and start <= never < shard.org_vocab_end_index
        token, largest, logsumexp = row_statistics(logits, never - start if is_here else None)
        token = (token + start).int()
        ours = torch.stack((largest, logsumexp, token.view(torch.float32)), -1)
        ranks = tensor_model_parallel_all_gather(ours, dim=0).view(self._weights.tp_size, len(hidden), 3)
        largest, logsumexp, token = ranks[..., 0], ranks[..., 1], ranks[..., 2].contiguous().view(torch.int32)
        best = largest.amax(0)
        first = token.masked_fill(largest != best, self._weights.org_vocab_size - 1).amin(0)
        return Best(first.long(), torch.exp(best - logsumexp.logsumexp(0)))


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
    denoiser_head: OutputHead
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
