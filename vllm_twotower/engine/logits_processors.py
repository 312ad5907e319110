"""vLLM's custom logits processors (``--logits-processors``), called in every pass that chooses tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from .targets import Targets

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
        self.applies = np.zeros(sampler.req_states.max_num_reqs + 1, dtype=bool)

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Tells every processor of a new request."""
        changes = [processor.add_request(slot, params) for processor in self._processors]
        self.applies[slot] = any(changes)

    def apply_staged_writes(self) -> None:
        """Lets the processors send to the device what they have staged."""
        for processor in self._processors:
            processor.apply_staged_writes()

    def apply(self, logits: Tensor, targets: Targets) -> None:
        """Changes the fp32 logits (T, V) of the targets' positions in place."""
        position = targets.starts[targets.row] + targets.column - 1
        expanded = targets.slots[targets.row]
        input_ids = self._text.gpu[expanded, position.clamp(min=0)].long()
        if targets.canvas is not None:
            before = targets.canvas[targets.row, (targets.column - 1).clamp(min=0)]
            input_ids = torch.where(targets.column > 0, before, input_ids)
        context = LogitsContext(
            expanded_idx_mapping=expanded.int(),
            idx_mapping=targets.slots.int(),
            idx_mapping_np=targets.host_slots,
            expanded_local_pos=targets.column.int(),
            input_ids=input_ids.int(),
            pos=position,
            seq_lens_upper_bound_np=targets.rows.host.ends,
        )
        for processor in self._processors:
            changed = processor.apply(logits, context)
            if changed is not logits:
                logits.copy_(changed)
