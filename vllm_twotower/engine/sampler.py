"""The sampler object that vLLM's model runner calls after the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower.model.two_tower import StepLogits

from .block_sampler import STRATEGIES, draw, predict, probability, suppress_mask_token, uniform
from .request_table import RequestTable, RowOptions
from .step_plan import CanvasInputs, StepPlan


class TwoTowerSampler:
    """Advances canvases by one denoising step, and autoregressive rows by one token.

    What it tells vLLM: a row that returns w tokens has sampled w, and of a canvas row's scheduled tokens those that
    were not returned are rejected, so that the next step starts at the same position again.
    """

    def __init__(self, sampler: Sampler, table: RequestTable, current_plan: Callable[[], StepPlan | None]):
        # The runner reads these from any sampler it holds.
        self.req_states = sampler.req_states
        self.sampling_states = sampler.sampling_states
        self.compute_nans = False
        self.penalties_state = SimpleNamespace(output_bin_counts=None)
        self._table = table
        self._current_plan = current_plan

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Nothing: the model state has added the request to the table."""

    def apply_staged_writes(self) -> None:
        """Nothing: the table is written directly."""

    def __call__(self, logits: StepLogits, input_batch: InputBatch) -> SamplerOutput:
        """Samples for one step; ``logits`` are those of the current plan's rows."""
        plan, table = self._current_plan(), self._table
        num_reqs, device = input_batch.num_reqs, table.canvas.device
        sampled = torch.zeros(num_reqs, table.engine.canvas_length, dtype=torch.int64, device=device)
        num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        if plan is None:  # memory is being profiled: draw for a step full of canvases
            predict(logits.denoiser.float())
            return SamplerOutput(sampled, None, None, num_sampled, torch.zeros_like(num_sampled))
        slots = input_batch.idx_mapping_np
        self._emit_committed(plan, slots, sampled, num_sampled)
        self._next_tokens(plan, slots, logits.context)
        if plan.canvas is not None:
            self._denoise(plan, slots, logits.denoiser, sampled, num_sampled)
        canvas_rows = np.where(input_batch.is_prefilling_np, 0, input_batch.num_scheduled_tokens)
        scheduled = async_tensor_h2d(canvas_rows, device=device, dtype=torch.int32)
        num_rejected = scheduled - num_sampled * (scheduled > 0)
        return SamplerOutput(sampled, None, None, num_sampled, num_rejected)

    def _emit_committed(
        self, plan: StepPlan, slots: np.ndarray, sampled: torch.Tensor, num_sampled: torch.Tensor
    ) -> None:
        """Returns the pending tokens of rows that emit when they commit, and forgets what was committed."""
        table, emits = self._table, np.flatnonzero(plan.split.emits)
        if len(emits):
            rows = async_tensor_h2d(emits, device=sampled.device)
            sampled[rows] = table.pending_tokens[async_tensor_h2d(slots[emits], device=sampled.device)]
            num_sampled[rows] = async_tensor_h2d(table.pending[slots[emits]], device=sampled.device, dtype=torch.int32)
        table.pending[slots[plan.split.commits]] = 0

    def _next_tokens(self, plan: StepPlan, slots: np.ndarray, logits: torch.Tensor | None) -> None:
        """Chooses the next token of autoregressive rows from the context head's logits (A, V)."""
        if logits is None:
            return
        table, rows = self._table, plan.split.context
        chosen = plan.split.next_token[rows.batch_rows]
        ar_slots = slots[rows.batch_rows[chosen]]
        device_slots = async_tensor_h2d(ar_slots, device=logits.device)
        position = async_tensor_h2d(rows.seq_lens[chosen], device=logits.device)
        logits = logits.float()
        tokens = logits.argmax(-1)
        hot = table.is_random[ar_slots]
        if hot.any():
            self._draw(tokens, logits, hot, table.options.rows(device_slots), position, torch.zeros_like(position), 0)
        table.pending_tokens[device_slots, 0] = tokens
        table.pending[ar_slots] = 1

    def _denoise(
        self,
        plan: StepPlan,
        slots: np.ndarray,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
    ) -> None:
        """One denoising step of all canvas rows from logits (T, V); converged blocks become pending."""
        table, canvas_rows = self._table, plan.canvas
        engine, canvas = table.engine, table.canvas[canvas_rows.slots]
        options, step = table.options.rows(canvas_rows.slots), table.step[canvas_rows.slots]
        host_slots = slots[plan.split.canvas.batch_rows]
        masked = (canvas == engine.mask_token_id) & canvas_rows.valid
        prediction, confidence = self._predict(plan, host_slots, logits.float(), options, step)
        commit = STRATEGIES["confidence_unmasking"](confidence, masked, step, options)
        canvas = torch.where(commit & masked, prediction, canvas)
        converged = ~(masked & ~commit).any(1)

        table.step[canvas_rows.slots] = torch.where(converged, 0, step + 1)
        table.canvas[canvas_rows.slots] = canvas.masked_fill(converged[:, None], engine.mask_token_id)
        pending = table.pending_tokens[canvas_rows.slots]
        table.pending_tokens[canvas_rows.slots] = torch.where(converged[:, None], canvas, pending)
        if engine.commit == "lazy":
            sampled[canvas_rows.batch_rows] = canvas
            num_sampled[canvas_rows.batch_rows] = (canvas_rows.lengths * converged).int()
        # The next step's rows depend on which blocks converged; the runner reads the step's outcome here anyway.
        done = converged.cpu().numpy()
        table.pending[host_slots[done]] = plan.split.canvas.lengths[done]

    def _predict(
        self,
        plan: StepPlan,
        host_slots: np.ndarray,
        logits: torch.Tensor,
        options: RowOptions,
        step: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted tokens and their confidences, both (R, S), from fp32 logits (T, V) of the packed canvas tokens."""
        table, canvas = self._table, plan.canvas
        suppress_mask_token(logits, table.engine.mask_token_id)
        tokens, confidences = predict(logits)
        hot_rows = table.is_random[host_slots]
        if hot_rows.any():
            rows = plan.split.canvas
            hot = np.repeat(hot_rows, rows.lengths)
            of_row = canvas.rows.row_of_token
            column = async_tensor_h2d(rows.spread(np.zeros(len(rows), dtype=np.int64)), device=logits.device)
            drawn = self._draw(tokens, logits, hot, options.rows(of_row), canvas.starts[of_row], step[of_row], column)
            confidences[drawn] = probability(logits[drawn], tokens[drawn])
        return _unpack(tokens, canvas), _unpack(confidences, canvas)

    @staticmethod
    def _draw(
        tokens: torch.Tensor,
        logits: torch.Tensor,
        hot: np.ndarray,
        options: RowOptions,
        position: torch.Tensor,
        step: torch.Tensor,
        column: torch.Tensor | int,
    ) -> torch.Tensor:
        """Replaces ``tokens`` (T,) where ``hot`` (T,) by draws; returns the indices of those rows.

        The numbers depend on (seed, block, step, position) alone; a block is known by its first position.
        """
        rows = async_tensor_h2d(np.flatnonzero(hot), device=logits.device)
        column = torch.as_tensor(column, device=logits.device).expand(len(tokens))
        number = uniform(options.seed[rows], position[rows], step[rows], column[rows])
        tokens[rows] = draw(logits[rows], options.rows(rows), number)
        return rows


def _unpack(values: torch.Tensor, canvas: CanvasInputs) -> torch.Tensor:
    """(T,) of packed canvas tokens -> (R, S), zero where a row is shorter."""
    return values.new_zeros(canvas.valid.numel()).index_copy_(0, canvas.places, values).view(canvas.valid.shape)
