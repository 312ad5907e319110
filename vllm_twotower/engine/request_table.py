"""What the worker keeps for every running request: its options and the state of its canvas."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import vllm.envs as envs
from vllm.sampling_params import SamplingParams

from vllm_twotower.options import FIRST_MODE, EngineOptions, RequestOptions
from vllm_twotower.sampling.row_options import RowOptions
from vllm_twotower.sampling.strategies import NOISE_SCHEDULES, REMASKING_SCORES, strategies

from .logit_rules import RuleTable
from .token_logprobs import LogprobTable
from .traces import TraceTable

_COLUMN_TYPES = {
    "max_steps": torch.int64,
    "noise_schedule": torch.int64,
    "adaptive_unmasking": torch.bool,
    "remasking": torch.int64,
    "top_k": torch.int64,
    "seed": torch.int64,
}


class RequestTable:
    """Per-request state, a row for each slot that vLLM's ``RequestState`` hands out, and one for no request.

    NumPy arrays hold what decides which rows a step runs; tensors on ``device`` hold what tokens are chosen with, and
    whether a request's blocks are drafts.
    ``read`` counts the tokens that the context tower has read of a request. ``stops`` are the tokens that end it.
    Rows that fill up a pass have the slot ``no_request``.
    """

    def __init__(
        self, max_num_reqs: int, max_model_len: int, engine: EngineOptions, vocab_size: int, device: torch.device
    ):
        self.max_model_len = max_model_len
        self.engine = engine
        self.vocab_size = vocab_size
        self.device = device
        self.no_request, num_slots = max_num_reqs, max_num_reqs + 1
        self.strategies = list(strategies().values())
        self.strategy_names = list(strategies())
        self.width = np.zeros(num_slots, dtype=np.int64)
        self.read = np.zeros(num_slots, dtype=np.int64)
        self.is_ar = np.zeros(num_slots, dtype=bool)
        self.is_auto = np.zeros(num_slots, dtype=bool)
        self.starts_with_ar = np.zeros(num_slots, dtype=bool)
        self.verifies = np.zeros(num_slots, dtype=bool)
        self.has_grammar = np.zeros(num_slots, dtype=bool)
        self.stops: list[frozenset[int]] = [frozenset()] * num_slots
        self.is_random = np.zeros(num_slots, dtype=bool)
        self.is_filtered = np.zeros(num_slots, dtype=bool)
        self.scores_prompt = np.zeros(num_slots, dtype=bool)
        self.strategy = np.zeros(num_slots, dtype=np.int64)
        # What a captured pass does depends on no request.
        self.is_random[self.no_request] = self.verifies[self.no_request] = True
        self.traces = TraceTable(num_slots, engine.canvas_length, self.no_request)
        self.clear()

        self.is_draft = torch.zeros(num_slots, dtype=torch.bool, device=device)
        shape = (num_slots, engine.canvas_length)
        self.canvas = torch.full(shape, engine.mask_token_id, dtype=torch.int64, device=device)
        self.step = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.options = RowOptions(
            **{
                name: torch.ones(num_slots, dtype=_COLUMN_TYPES.get(name, torch.float32), device=device)
                for name in RowOptions.__dataclass_fields__
            }
        )

    def clear(self) -> None:
        """Forgets what all requests' rules and log-probabilities are, with the memory that this takes."""
        self.rules = RuleTable(len(self.width), self.vocab_size, self.device)
        self.logprobs = LogprobTable(len(self.width), self.engine.canvas_length, self.vocab_size, self.device)

    def needs_logits(self, slots: np.ndarray) -> np.ndarray:
        """Which of the requests (n,) need whole rows of logits: those of which more than a temperature is asked."""
        has_margin, has_energy = (
            np.array([name in strategy.needs for strategy in self.strategies])[self.strategy[slots]]
            for name in ("margin", "energy")
        )
        asks = self.is_filtered[slots] | self.rules.has_rules[slots] | self.logprobs.has_logprobs[slots]
        return asks | has_margin | (has_energy & self.is_random[slots])

    def add(self, slot: int, request_id: str, params: SamplingParams) -> None:
        """Starts a request in ``slot``, new or resumed, with an empty canvas.

        Without a seed the engine's seed and the request's id are one: every tensor-parallel rank draws the same tokens,
        a preempted request goes on as it began, and an offline run can be repeated.
        """
        options = RequestOptions.of(params, self.engine)
        self.width[slot] = options.canvas_length
        self.is_ar[slot] = options.mode == "ar"
        self.is_auto[slot] = options.mode == "auto"
        self.verifies[slot] = self.is_draft[slot] = options.verifies
        self.starts_with_ar[slot] = self.is_auto[slot] and (params.extra_args or {}).get(FIRST_MODE) == "ar"
        self.has_grammar[slot] = params.structured_outputs is not None
        self.stops[slot] = frozenset({params.eos_token_id, *(params.stop_token_ids or ())} - {None})
        self.is_random[slot] = params.temperature > 0
        self.is_filtered[slot] = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self.scores_prompt[slot] = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        self.strategy[slot] = self.strategy_names.index(options.strategy)
        self.rules.set(slot, params)
        self.logprobs.set(slot, params)
        self.traces.set(slot, options.trace)
        self.canvas[slot] = self.engine.mask_token_id
        self.step[slot] = 0
        values: dict[str, Any] = {
            "max_steps": options.passes_per_block,
            "confidence_threshold": options.confidence_threshold,
            "noise_schedule": list(NOISE_SCHEDULES).index(options.noise_schedule),
            "adaptive_unmasking": options.adaptive_unmasking,
            "remasking": REMASKING_SCORES.index(options.remasking),
            "temperature": params.temperature,
            "top_k": min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": self._seed(request_id) if params.seed is None else params.seed % 2**63,
        }
        for name, column in vars(self.options).items():
            column[slot] = values[name]

    def _seed(self, request_id: str) -> int:
        if not envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
            request_id = request_id.rsplit("-", 1)[0]  # the rest vLLM makes up anew in every run
        return zlib.crc32(f"{self.engine.seed} {request_id}".encode())
