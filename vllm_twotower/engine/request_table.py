"""What the worker keeps for every running request: its options and the state of its canvas."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from vllm.sampling_params import SamplingParams

from vllm_twotower.config import EngineOptions, RequestOptions


@dataclass
class RowOptions:
    """Options of a step's rows, gathered from the table; each tensor is (R,)."""

    max_steps: torch.Tensor
    confidence_threshold: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor

    def rows(self, index: torch.Tensor) -> RowOptions:
        """The options of some rows, in the order of ``index``."""
        return RowOptions(**{name: column[index] for name, column in vars(self).items()})


class RequestTable:
    """Per-request state, a row for each slot that vLLM's ``RequestState`` hands out.

    NumPy arrays hold what decides which rows a step runs; tensors on ``device`` hold what the sampler computes with.
    ``pending`` counts the tokens in ``pending_tokens`` that the context tower must read next: a finished block, or
    the next token of an autoregressive request.
    """

    def __init__(self, max_num_reqs: int, engine: EngineOptions, vocab_size: int, device: torch.device):
        self.engine = engine
        self.vocab_size = vocab_size
        self.width = np.zeros(max_num_reqs, dtype=np.int64)
        self.pending = np.zeros(max_num_reqs, dtype=np.int64)
        self.is_ar = np.zeros(max_num_reqs, dtype=bool)
        self.is_random = np.zeros(max_num_reqs, dtype=bool)

        shape = (max_num_reqs, engine.canvas_length)
        self.canvas = torch.full(shape, engine.mask_token_id, dtype=torch.int64, device=device)
        self.pending_tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self.options = RowOptions(
            max_steps=torch.ones(max_num_reqs, dtype=torch.int64, device=device),
            confidence_threshold=torch.ones(max_num_reqs, dtype=torch.float32, device=device),
            temperature=torch.zeros(max_num_reqs, dtype=torch.float32, device=device),
            top_k=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
            top_p=torch.ones(max_num_reqs, dtype=torch.float32, device=device),
            min_p=torch.zeros(max_num_reqs, dtype=torch.float32, device=device),
            seed=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )

    def add(self, slot: int, request_id: str, params: SamplingParams) -> None:
        """Starts a request in ``slot``, new or resumed, with an empty canvas.

        Without a seed the request's unique id is one: every tensor-parallel rank draws the same tokens, and a
        preempted request goes on as it began.
        """
        options = RequestOptions.parse(params.extra_args, self.engine)
        self.width[slot] = options.canvas_length
        self.pending[slot] = 0
        self.is_ar[slot] = options.mode == "ar"
        self.is_random[slot] = params.temperature > 0
        self.canvas[slot] = self.engine.mask_token_id
        self.step[slot] = 0
        values = RowOptions(
            max_steps=options.max_steps,
            confidence_threshold=options.confidence_threshold,
            temperature=params.temperature,
            top_k=min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=zlib.crc32(request_id.encode()) if params.seed is None else params.seed % 2**63,
        )
        for name, column in vars(self.options).items():
            column[slot] = getattr(values, name)
