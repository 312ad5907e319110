"""vLLM's custom logits processors (``--logits-processors``), called in every pass that chooses tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

_BUILT_IN = (LogitBiasState, PenaltiesState, BadWordsState)  # logit_rules.py has these


class CustomLogitsProcessors:
    """The custom processors that vLLM's sampler was made with; ``applies`` (slots,) says which requests they change.

    A processor sees the rows of logits as those of speculative decoding: the one for position p of a sequence has
    ``pos`` p - 1 and the token there as its ``input_ids``, which within a block is the mask token as long as that
    position is not decided.
    """

    def __init__(self, sampler: Sampler):
        self._processors: list[LogitsProcessor] = [
            processor for processor in sampler.logits_processors if not isinstance(processor, _BUILT_IN)
        ]
        self._text = sampler.req_states.all_token_ids
        self.applies = np.zeros(sampler.req_states.max_num_reqs, dtype=bool)

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Tells every processor of a new request."""
        changes = [processor.add_request(slot, params) for processor in self._processors]
        self.applies[slot] = any(changes)

    def apply_staged_writes(self) -> None:
        """Lets the processors send to the device what they have staged."""
        for processor in self._processors:
            processor.apply_staged_writes()

    def apply(
        self,
        logits: Tensor,
        host_slots: np.ndarray,
        starts: np.ndarray,
        row_of_token: np.ndarray,
        columns: np.ndarray,
        canvas: Tensor | None,
    ) -> None:
        """Changes fp32 logits (T, V) in place.

        The T tokens lie at ``columns`` (T,) behind position ``starts`` (R,) of R rows, those of the requests
        ``host_slots`` (R,); ``canvas`` (R, S) has what stands there, where a row has more than one.
        """
        if not self.applies[host_slots].any():
            return
        device = logits.device
        slots, row, column, first = (
            async_tensor_h2d(values, device=device) for values in (host_slots, row_of_token, columns, starts)
        )
        expanded = slots[row]
        position = first[row] + column - 1
        input_ids = self._text.gpu[expanded, position.clamp(min=0)].long()
        if canvas is not None:
            input_ids = torch.where(column > 0, canvas[row, (column - 1).clamp(min=0)], input_ids)
        context = LogitsContext(
            expanded_idx_mapping=expanded.int(),
            idx_mapping=slots.int(),
            idx_mapping_np=host_slots,
            expanded_local_pos=column.int(),
            input_ids=input_ids.int(),
            pos=position,
            seq_lens_upper_bound_np=starts + np.bincount(row_of_token, minlength=len(starts)),
        )
        for processor in self._processors:
            changed = processor.apply(logits, context)
            if changed is not logits:
                logits.copy_(changed)
