"""The sampler object that vLLM's model runner calls after the forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import xgrammar
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower.model.step_logits import StepLogits
from vllm_twotower.planning.step_policy import AUTO_PASSES_PER_STEP, worth_a_context_pass
from vllm_twotower.sampling.prediction import (
    draw,
    margin,
    predict,
    probability,
    suppress_mask_token,
    temper_and_filter,
)
from vllm_twotower.sampling.row_options import RowOptions
from vllm_twotower.sampling.strategies import Commit, DenoiserPass
from vllm_twotower.sampling.uniform import uniform

from .blocks import Blocks
from .logit_rules import UNDECIDED, Text
from .request_table import RequestTable
from .staging import Staging
from .step_plan import RowSplit, StepPlan, TowerRows
from .token_logprobs import collect


class PassSource(Protocol):
    """Where the sampler gets a step's plan and further passes from: the model state."""

    table: RequestTable
    staging: Staging

    def take_plan(self) -> StepPlan | None: ...

    def denoise_again(self, blocks: Blocks, changed: bool) -> torch.Tensor: ...


class TwoTowerSampler:
    """Advances canvases by one or more denoiser passes, and autoregressive rows by one token.

    What it tells vLLM: a row that returns w tokens has sampled w, and of a canvas row's scheduled tokens those that
    were not returned are rejected, so that the next step starts at the same position again. A row whose prompt ended in
    this step has scheduled no canvas; what it returns of its first one counts as computed all the same.
    ``num_nans``, which vLLM hands to the scheduler by request, says which towers ran the row: 2 for every denoiser pass
    over its block, 1 for the context tower.

    ``logprobs_mode`` is vLLM's: whether log-probabilities are those of the logits as the model gives them (``raw``) or
    of the distribution that tokens are drawn from (``processed``).
    """

    def __init__(self, sampler: Sampler, source: PassSource, logprobs_mode: str = "raw_logprobs"):
        # The runner reads these from any sampler it holds.
        self.req_states = sampler.req_states
        self.sampling_states = sampler.sampling_states
        self.compute_nans = False
        self.penalties_state = SimpleNamespace(output_bin_counts=None)
        self._source, self._table = source, source.table
        self._scores_processed = logprobs_mode.startswith("processed")
        self._scores_as_logits = logprobs_mode.endswith("logits")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Nothing: the model state has added the request to the table."""

    def apply_staged_writes(self) -> None:
        """Nothing: the table is written directly."""

    def __call__(self, logits: StepLogits, input_batch: InputBatch) -> SamplerOutput:
        """Samples for one step; ``logits`` are those of the current plan's rows."""
        plan, table = self._source.take_plan(), self._table
        num_reqs, device = input_batch.num_reqs, table.device
        sampled = torch.zeros(num_reqs, table.engine.canvas_length, dtype=torch.int64, device=device)
        num_sampled = np.zeros(num_reqs, dtype=np.int32)
        if plan is None:  # memory is being profiled
            predict(logits.denoiser_head(logits.denoiser[: logits.tile]).float())
            nothing = torch.zeros(num_reqs, dtype=torch.int32, device=device)
            return SamplerOutput(sampled, None, None, nothing, nothing.clone())
        # Draft tokens are placeholders here, so the scheduler has none to check against a grammar.
        input_batch.has_structured_output_reqs = False
        slots, split = input_batch.idx_mapping_np, plan.split
        passes = np.zeros(num_reqs, dtype=np.int32)
        passes[split.context.batch_rows] = 1
        self._emit_committed(plan, slots, sampled, num_sampled)
        grammar = _grammar_rows(logits, input_batch)
        if logits.context is not None:
            rows = split.context.take(split.next_token[split.context.batch_rows])
            for part in _tiles(len(rows), logits.tile):
                context = logits.context_head(logits.context[part]).float()
                tokens = self._next_tokens(rows.take(part), slots, context, grammar, sampled, num_sampled)
                table.pending_tokens[self._device_slots(slots, rows.take(part)), 0] = tokens
        if len(split.mock_ar):
            self._mock_ar(plan, slots, logits, grammar, sampled, num_sampled)
        if plan.blocks is not None:
            self._fill(plan.blocks, split, logits, sampled, num_sampled, passes)

        is_block = ~(table.is_ar[slots] | table.is_mock_ar[slots])
        drafts = np.where(input_batch.is_prefilling_np[:num_reqs], 0, input_batch.num_scheduled_tokens[:num_reqs])
        rejected = is_block * (drafts - num_sampled)
        wanted = {row: table.logprobs[slots[row]] for row in np.flatnonzero(table.has_logprobs[slots]).tolist()}
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=collect(wanted, num_sampled.tolist()) if wanted else None,
            num_nans=async_tensor_h2d(passes, device=device),
            num_sampled=async_tensor_h2d(num_sampled, device=device),
            num_rejected=async_tensor_h2d(rejected, device=device, dtype=torch.int32),
        )

    def _device_slots(self, slots: np.ndarray, rows: TowerRows) -> torch.Tensor:
        return async_tensor_h2d(slots[rows.batch_rows], device=self._table.device)

    def _mock_ar(
        self,
        plan: StepPlan,
        slots: np.ndarray,
        logits: StepLogits,
        grammar: dict[int, np.ndarray],
        sampled: torch.Tensor,
        num_sampled: np.ndarray,
    ) -> None:
        """The next tokens of ``mock_ar`` rows, whose newest tokens are the last the denoiser ran on."""
        table, first = self._table, len(logits.denoiser) - len(plan.split.mock_ar)
        for part in _tiles(len(plan.split.mock_ar), logits.tile):
            rows = plan.split.mock_ar.take(part)
            of_rows = slice(first + part.start, first + part.stop)
            denoiser = logits.denoiser_head(logits.denoiser[of_rows]).float()
            tokens = self._next_tokens(rows, slots, denoiser, grammar, sampled, num_sampled)
            device_slots = self._device_slots(slots, rows)
            table.pending_tokens[device_slots, 0] = plan.canvas.input_ids[of_rows].long()
            table.canvas[device_slots, 0] = tokens

    def _fill(
        self,
        blocks: Blocks,
        split: RowSplit,
        logits: StepLogits,
        sampled: torch.Tensor,
        num_sampled: np.ndarray,
        passes: np.ndarray,
    ) -> None:
        """Denoises the blocks, as often as a step may; blocks that are whole drop out."""
        engine = self._table.engine
        limit = engine.denoise_steps_per_engine_step
        num_canvases, num_finished = len(blocks) + split.num_held, split.num_held
        hidden = logits.denoiser[: blocks.rows.num_tokens]
        for count in itertools.count(1):
            converged = self._denoise_tiles(blocks, hidden, logits, sampled, num_sampled)
            passes[blocks.rows.batch_rows] += 2
            num_finished += int(converged.sum())
            if limit == "auto":
                # A whole block's request goes on in the next step, unless it has to wait for others anyway.
                is_grouped = engine.commit == "grouped" and not worth_a_context_pass(num_finished, num_canvases)
                goes_on = is_grouped or num_finished == split.num_held
                is_last = split.others_wait or not goes_on or count == AUTO_PASSES_PER_STEP
            else:
                is_last = count == limit
            if is_last or converged.all():
                return
            changed = count == 1 and len(split.mock_ar) > 0  # these rows have had their pass
            if converged.any():
                left = np.flatnonzero(~converged)
                blocks, changed = self._blocks(blocks.rows.take(left), blocks.host_slots[left]), True
            hidden = self._source.denoise_again(blocks, changed)

    def _blocks(self, rows: TowerRows, host_slots: np.ndarray) -> Blocks:
        return Blocks(rows, host_slots, self._table, self._source.staging)

    def _denoise_tiles(
        self, blocks: Blocks, hidden: torch.Tensor, logits: StepLogits, sampled: torch.Tensor, num_sampled: np.ndarray
    ) -> np.ndarray:
        """One pass over the blocks, a tile of logits at a time; returns which (R,) are whole."""
        if len(hidden) <= logits.tile:
            return self._denoise(blocks, logits.denoiser_head(hidden).float(), sampled, num_sampled)
        converged, bounds = [], blocks.rows.query_start_loc
        for part in _tiles(len(blocks), max(1, logits.tile // self._table.engine.canvas_length)):
            some = self._blocks(blocks.rows.take(part), blocks.host_slots[part])
            of_tile = logits.denoiser_head(hidden[bounds[part.start] : bounds[part.stop]]).float()
            converged.append(self._denoise(some, of_tile, sampled, num_sampled))
        blocks.load(self._table)
        return np.concatenate(converged)

    def _emit_committed(
        self, plan: StepPlan, slots: np.ndarray, sampled: torch.Tensor, num_sampled: np.ndarray
    ) -> None:
        """Returns the pending tokens of rows that emit when they commit, and forgets what was committed."""
        table, emits = self._table, np.flatnonzero(plan.split.emits)
        if len(emits):
            rows = async_tensor_h2d(emits, device=sampled.device)
            sampled[rows] = table.pending_tokens[async_tensor_h2d(slots[emits], device=sampled.device)]
            num_sampled[emits] = table.pending[slots[emits]]
        left = plan.split.still_pending
        table.read[slots] = np.where(left > 0, table.read[slots] + table.pending[slots] - left, 0)
        table.pending[slots] = left

    def _next_tokens(
        self,
        rows: TowerRows,
        slots: np.ndarray,
        logits: torch.Tensor,
        grammar: dict[int, np.ndarray],
        sampled: torch.Tensor,
        num_sampled: np.ndarray,
    ) -> torch.Tensor:
        """Chooses and returns the next token (A,) of autoregressive rows from fp32 logits (A, V)."""
        table, device = self._table, logits.device
        host_slots, batch_rows = slots[rows.batch_rows], rows.batch_rows
        if chosen := [i for i, row in enumerate(batch_rows.tolist()) if row in grammar]:
            bitmask = np.stack([grammar[int(batch_rows[i])] for i in chosen])
            constrained = logits[chosen]
            xgrammar.apply_token_bitmask_inplace(constrained, async_tensor_h2d(bitmask, device=device))
            logits[chosen] = constrained
        raw = self._apply_rules(rows, host_slots, logits, None)
        tokens = logits.argmax(-1)
        hot = np.flatnonzero(table.is_random[host_slots])
        if len(hot):
            chosen = async_tensor_h2d(hot, device=device)
            options = table.options.rows(async_tensor_h2d(host_slots[hot], device=device))
            position = async_tensor_h2d(rows.seq_lens[hot], device=device)
            zero = torch.zeros_like(position)
            shaped = self._shape(logits[chosen], options, host_slots[hot])
            tokens[chosen] = draw(shaped, uniform(options.seed, position, zero, zero))
            self._keep_processed(raw, hot, shaped, np.arange(len(rows)))
        for i in np.flatnonzero(table.has_logprobs[host_slots]).tolist():
            one = slice(i, i + 1)
            always = torch.ones(1, dtype=torch.bool, device=device)
            table.logprobs[host_slots[i]].record(always, raw.get(i, logits[one]), tokens[one], self._scores_as_logits)
        sampled[async_tensor_h2d(batch_rows, device=device), 0] = tokens
        num_sampled[batch_rows] = 1
        table.pending[host_slots] = 1
        return tokens

    def _denoise(
        self, blocks: Blocks, logits: torch.Tensor, sampled: torch.Tensor, num_sampled: np.ndarray
    ) -> np.ndarray:
        """One denoising step of blocks from fp32 logits (T, V) of one pass; returns which (R,) are whole now.

        A whole block becomes pending, and is returned at once unless it must be committed first.
        """
        table, rows, host_slots = self._table, blocks.rows, blocks.host_slots
        engine = table.engine
        suppress_mask_token(logits, engine.mask_token_id)
        scored = self._apply_rules(rows, host_slots, logits, blocks)
        denoised = self._predict(blocks, logits, scored)
        commit = self._commit(blocks, denoised)
        positions = self._hold_back(blocks, denoised, commit.positions)
        canvas = torch.where(positions, denoised.prediction, blocks.canvas)
        converged = ~(blocks.masked & ~positions).any(1)
        bounds = rows.query_start_loc
        for i in np.flatnonzero(table.has_logprobs[host_slots]).tolist():
            n, of_row = int(rows.lengths[i]), slice(bounds[i], bounds[i + 1])
            table.logprobs[host_slots[i]].record(
                positions[i, :n], scored.get(i, logits[of_row]), denoised.prediction[i, :n], self._scores_as_logits
            )

        # The next rows depend on which blocks are whole.
        done = converged.cpu().numpy()
        blocks.set(canvas, commit.step + 1, engine.mask_token_id)
        if not done.any():
            blocks.store(table)
            return done
        table.step[blocks.slots] = torch.where(converged, 0, blocks.step)
        table.canvas[blocks.slots] = canvas.masked_fill(converged[:, None], engine.mask_token_id)
        pending = table.pending_tokens[blocks.slots]
        table.pending_tokens[blocks.slots] = torch.where(converged[:, None], canvas, pending)
        table.pending[host_slots[done]] = rows.lengths[done]
        if engine.commit != "separate":
            whole = async_tensor_h2d(np.flatnonzero(done), device=canvas.device)
            sampled[async_tensor_h2d(rows.batch_rows[done], device=canvas.device)] = canvas[whole]
            num_sampled[rows.batch_rows[done]] = rows.lengths[done]
        return done

    def _text(self, slot: int, start: int, ahead: torch.Tensor) -> Text:
        """The tokens of a request before position ``start``, and those from there on."""
        prompt_len = int(self.req_states.prompt_len.np[slot])
        tokens = self.req_states.all_token_ids.gpu[slot, :start].long()
        return Text(tokens[:prompt_len], tokens[prompt_len:], ahead)

    def _ahead(self, blocks: Blocks | None, row: int, length: int) -> torch.Tensor:
        """What stands at the positions that a row predicts."""
        if blocks is None:
            return torch.full((1,), UNDECIDED, dtype=torch.int64, device=self._table.device)
        return blocks.canvas[row, :length].masked_fill(blocks.masked[row, :length], UNDECIDED)

    def _apply_rules(
        self,
        rows: TowerRows,
        host_slots: np.ndarray,
        logits: torch.Tensor,
        blocks: Blocks | None,
    ) -> dict[int, torch.Tensor]:
        """Applies the requests' rules to their logits in place: those of the blocks' tokens, or one of each row.

        Returns the logits as they were, by row, where log-probabilities of these are wanted.
        """
        table, raw = self._table, {}
        bounds = np.arange(len(rows) + 1) if blocks is None else rows.query_start_loc
        for i in np.flatnonzero(table.has_rules[host_slots]).tolist():
            of_row = logits[bounds[i] : bounds[i + 1]]
            if table.has_logprobs[host_slots[i]] and not self._scores_processed:
                raw[i] = of_row.clone()
            start = int(rows.seq_lens[i] if blocks is None else rows.starts[i])
            text = self._text(host_slots[i], start, self._ahead(blocks, i, len(of_row)))
            table.rules[host_slots[i]].apply(of_row, text)
        return raw

    def _shape(self, logits: torch.Tensor, options: RowOptions, host_slots: np.ndarray) -> torch.Tensor:
        """Tempered and filtered logits of rows with a temperature; ``host_slots`` are theirs."""
        if not self._table.is_filtered[host_slots].any():  # the filters sort the vocabulary
            return logits / options.temperature[:, None]
        return temper_and_filter(logits, options)

    def _keep_processed(
        self, scored: dict[int, torch.Tensor], hot: np.ndarray, shaped: torch.Tensor, row_of_token: np.ndarray
    ) -> None:
        """Notes the logits (n, V) that the rows of tokens ``hot`` (n,) draw from, if log-probabilities are of those."""
        if self._scores_processed:
            of_row = row_of_token[hot]
            for row in np.unique(of_row).tolist():
                first, end = np.searchsorted(of_row, (row, row + 1))
                scored[row] = shaped[first:end]

    def _predict(self, blocks: Blocks, logits: torch.Tensor, scored: dict[int, torch.Tensor]) -> DenoiserPass:
        """Predictions and what the strategies ask of them, from fp32 logits (T, V) of the blocks' tokens."""
        table, host_slots = self._table, blocks.host_slots
        needs = frozenset().union(*(table.strategies[index].needs for index, _ in blocks.strategy_rows))
        tokens, confidence = predict(logits)
        energy = confidence.log() if "energy" in needs else None
        if table.is_random[host_slots].any():
            row_of_token = blocks.rows.row_of_token
            hot = np.flatnonzero(table.is_random[host_slots][row_of_token])
            chosen = async_tensor_h2d(hot, device=logits.device)
            of_row = blocks.row_of_token[chosen]
            options = blocks.options.rows(of_row)
            hot_logits = logits[chosen]
            shaped = self._shape(hot_logits, options, host_slots[row_of_token[hot]])
            number = uniform(options.seed, blocks.starts[of_row], blocks.step[of_row], blocks.column[chosen])
            tokens[chosen] = draw(shaped, number)
            confidence[chosen] = probability(hot_logits, tokens[chosen])
            if energy is not None:
                energy[chosen] = options.temperature * shaped.logsumexp(-1) - hot_logits.logsumexp(-1)
            self._keep_processed(scored, hot, shaped, row_of_token)

        return DenoiserPass(
            prediction=blocks.by_row(tokens),
            confidence=blocks.by_row(confidence),
            masked=blocks.masked,
            step=blocks.step,
            start=blocks.starts,
            width=blocks.lengths,
            margin=blocks.by_row(margin(logits)) if "margin" in needs else None,
            energy=None if energy is None else blocks.by_row(energy),
        )

    def _commit(self, blocks: Blocks, denoised: DenoiserPass) -> Commit:
        """What each row's strategy commits; in the last pass that a request allows, all that is left."""
        if blocks.strategy_rows[0][1] is None:
            result = self._table.strategies[blocks.strategy_rows[0][0]].commit(denoised, blocks.options)
        else:
            result = Commit(torch.zeros_like(blocks.masked), blocks.step.clone())
            for index, rows in blocks.strategy_rows:
                commit = self._table.strategies[index].commit(denoised.rows(rows), blocks.options.rows(rows))
                result.positions[rows], result.step[rows] = commit.positions, commit.step
        is_last = result.step >= blocks.options.max_steps - 1
        return Commit((result.positions | is_last[:, None]) & blocks.masked, result.step)

    def _hold_back(self, blocks: Blocks, denoised: DenoiserPass, positions: torch.Tensor) -> torch.Tensor:
        """The positions (R, S) without those whose tokens would make up a request's banned phrase."""
        table, rows, host_slots = self._table, blocks.rows, blocks.host_slots
        for i in np.flatnonzero(table.has_rules[host_slots]).tolist():
            rules = table.rules[host_slots[i]]
            if rules.phrases:
                n = int(rows.lengths[i])
                new = positions[i, :n]
                ahead = torch.where(new, denoised.prediction[i, :n], self._ahead(blocks, i, n))
                text = self._text(host_slots[i], int(rows.starts[i]), ahead)
                positions[i, :n] = rules.hold_back(text, new, denoised.confidence[i, :n])
        return positions


def _tiles(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _grammar_rows(logits: StepLogits, input_batch: InputBatch) -> dict[int, np.ndarray]:
    """The grammar's bitmask (V / 32,) of each batch row that has one."""
    if logits.grammar is None:
        return {}
    row_of = {name: row for row, name in enumerate(input_batch.req_ids)}
    return {row_of[name]: mask for name, mask in zip(*logits.grammar, strict=True)}
