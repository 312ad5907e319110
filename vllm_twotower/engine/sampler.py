"""The sampler object that vLLM's model runner calls after the forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.prompt_logprob import CHUNK_SIZE
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower.model.step_logits import StepLogits

from .decision import Decision
from .fill import PassSource, StepFill
from .pass_decision import PassDecision
from .pass_plan import PassPlan
from .report import Report
from .request_table import RequestTable
from .step_rows import StepRows
from .targets import Canvases, NextTokens, Targets
from .tower_rows import DeviceRows, TowerRows


class StepSource(PassSource, Protocol):
    """Where the sampler gets a step from: the model state."""

    table: RequestTable

    def take_step(self) -> tuple[StepRows, PassPlan] | None:
        """The rows of this step and its first pass, once; None while memory is profiled."""


class TwoTowerSampler:
    """Fills blocks, by one or more passes, and returns what has come of them.

    What it tells vLLM: a row that returns w tokens has sampled w, and of its drafts, which stand for tokens to come,
    all but w are rejected; less than none where it returns more than it has drafts. So what is returned counts as
    computed, whether the context tower has read it or not. Only a request with a grammar has no drafts, and its newest
    token is computed in the next step. ``num_nans``, which vLLM hands to the scheduler by request, is a
    :class:`~.report.Report`.
    """

    def __init__(self, sampler: Sampler, source: StepSource, model_config: ModelConfig):
        # The runner reads these from any sampler it holds.
        self.req_states = sampler.req_states
        self.sampling_states = sampler.sampling_states
        self.compute_nans = False
        self.penalties_state = SimpleNamespace(output_bin_counts=None)
        self._source, self._table = source, source.table
        self._max_logprobs = model_config.max_logprobs
        self._decision = Decision(sampler, self._table, model_config)
        self.pass_decision = PassDecision(self._decision, self._table, sampler.req_states.all_token_ids.gpu)

    def needs_logits(self, slots: np.ndarray) -> np.ndarray:
        """Which of the requests in slots (n,) need whole rows of logits, or what is done with them on the host."""
        return self._decision.needs_logits(slots) | self._table.has_grammar[slots]

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Tells custom logits processors; the model state has added the request to the table."""
        self._decision.processors.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Those of custom logits processors; the table is written directly."""
        self._decision.processors.apply_staged_writes()

    def __call__(self, logits: StepLogits, input_batch: InputBatch) -> SamplerOutput:
        """Samples for one step; ``logits`` are those of its first pass."""
        step = self._source.take_step()
        if step is None:
            return self._profile(logits, input_batch.num_reqs)
        rows, plan = step
        # Draft tokens are placeholders here, so the scheduler has none to check against a grammar.
        input_batch.has_structured_output_reqs = False
        text = self.req_states.all_token_ids.gpu
        fill = StepFill(rows, self._table, text, self.pass_decision, self._source)
        fill.run(plan, logits, _bitmasks(logits, input_batch))
        self._table.read[rows.slots] = rows.read
        report = Report.pack(rows, fill.is_finite, self._table.traces.collect(rows))
        num_sampled, num_rejected = rows.num_new, rows.num_rejected
        tokens, num_sampled, num_rejected, report = (
            async_tensor_h2d(values, device=text.device) for values in (fill.tokens, num_sampled, num_rejected, report)
        )
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=self._table.logprobs.collect(rows.slots, rows.num_new),
            num_nans=report,
            num_sampled=num_sampled.int(),
            num_rejected=num_rejected.int(),
        )

    def _profile(self, logits: StepLogits, num_reqs: int) -> SamplerOutput:
        """Samples once for requests that ask for all there is, so that vLLM leaves memory for them."""
        table, width, context = self._table, self._table.engine.canvas_length, logits.context
        assert context is not None
        modes = [("ar", logits.tile), ("mask_diffusion", logits.tile // width)]
        for mode, most_rows in modes[:1] if table.engine.context_alone else modes:
            slots = np.arange(min(num_reqs, most_rows))
            for slot in slots.tolist():
                table.add(slot, "", demanding_params(mode, self._max_logprobs))
            rows = self._profiled_rows(slots, 1 if mode == "ar" else width)
            targets: Targets = NextTokens(rows, table, np.zeros_like(slots)) if mode == "ar" else Canvases(rows, table)
            head = logits.context_head if mode == "ar" else logits.denoiser_head
            assert head is not None
            hidden = context[: rows.num_tokens]
            for part, predicted in self._decision.predict(
                targets, hidden, head, logits.tile, frozenset({"confidence", "margin"})
            ):
                self._decision.record(part, predicted, torch.ones_like(predicted.tokens, dtype=torch.bool))
            table.clear()
        prompt = context[:CHUNK_SIZE]
        nothing = prompt.new_zeros(len(prompt), dtype=torch.int64)
        compute_topk_scores(logits.context_head(prompt), max(0, self._max_logprobs), nothing)
        tokens = torch.zeros(num_reqs, width, dtype=torch.int64, device=table.device)
        nothing = torch.zeros(num_reqs, dtype=torch.int32, device=table.device)
        return SamplerOutput(tokens, None, None, nothing, nothing.clone())

    def _profiled_rows(self, slots: np.ndarray, length: int) -> DeviceRows:
        """Rows at the end of as long requests as there can be."""
        lengths = np.full_like(slots, length)
        host = TowerRows(slots, self._table.max_model_len - lengths, lengths)
        of_host = (slots, slots, host.starts, lengths)
        batch_rows, on_device, starts, of_length = (
            async_tensor_h2d(values, device=self._table.device) for values in of_host
        )
        return DeviceRows(host, slots, batch_rows, on_device, starts, of_length, length, has_padding=False)


def _bitmasks(logits: StepLogits, input_batch: InputBatch) -> dict[int, np.ndarray]:
    """The grammars' bitmasks (V / 32,) int32 by row of vLLM's batch."""
    if logits.grammar is None:
        return {}
    row_of = {name: row for row, name in enumerate(input_batch.req_ids)}
    return {row_of[name]: bitmask for name, bitmask in zip(*logits.grammar, strict=True)}


def demanding_params(mode: str, max_logprobs: int) -> SamplingParams:
    """Those of a request for whose sampling the most memory is needed."""
    is_block = mode == "mask_diffusion"
    strategy = {"diffusion_strategy": "predict_and_noise", "diffusion_remasking": "margin"} if is_block else {}
    return SamplingParams(
        temperature=1.0,
        top_k=2,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        logit_bias={0: 1.0},
        stop_token_ids=[0],
        min_tokens=1,
        logprobs=max_logprobs,
        extra_args={"diffusion_mode": mode, **strategy},
    )
