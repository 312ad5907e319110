"""The sampler object that vLLM's model runner calls after the forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import xgrammar
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.prompt_logprob import CHUNK_SIZE
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower.model.step_logits import Best, OutputHead, StepLogits
from vllm_twotower.planning.step_policy import AUTO_PASSES_PER_STEP
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
from .logit_rules import NOTHING, UNDECIDED, RuledRows
from .logits_processors import CustomLogitsProcessors
from .request_table import RequestTable
from .staging import Staging
from .step_plan import StepPlan
from .token_logprobs import ScoredTokens
from .tower_rows import TowerRows


class PassSource(Protocol):
    """Where the sampler gets a step's plan and further passes from: the model state."""

    table: RequestTable
    staging: Staging

    def take_plan(self) -> StepPlan | None: ...

    def denoise_again(self, blocks: Blocks, changed: bool) -> torch.Tensor: ...


@dataclass
class StepOutput:
    """What a step's rows return: tokens (rows, S) on the device, and on the host how many of them (rows,).

    ``slots`` (rows,) are the rows' requests, ``passes`` (rows,) the towers that ran them, see :class:`TwoTowerSampler`.
    ``bitmasks`` (g, V / 32) are the grammars of the step, ``grammar`` (rows,) the row's one of them or -1.
    ``is_finite`` (rows,), on the device: whether all logits that the row's tokens were chosen by are.
    """

    slots: np.ndarray
    tokens: torch.Tensor
    num_sampled: np.ndarray
    passes: np.ndarray
    grammar: np.ndarray
    bitmasks: np.ndarray | None
    is_finite: torch.Tensor

    @classmethod
    def of(cls, logits: StepLogits, input_batch: InputBatch, canvas_length: int, device: torch.device) -> StepOutput:
        """That of a step of which nothing is sampled yet."""
        num_reqs, bitmasks = input_batch.num_reqs, None
        counts = np.zeros((2, num_reqs), dtype=np.int32)
        grammar = np.full(num_reqs, -1)
        if logits.grammar is not None:
            names, masks = logits.grammar
            row_of = {name: row for row, name in enumerate(input_batch.req_ids)}
            grammar[[row_of[name] for name in names]] = np.arange(len(names))
            bitmasks = np.stack(masks)
        tokens = torch.zeros(num_reqs, canvas_length, dtype=torch.int64, device=device)
        is_finite = torch.ones(num_reqs, dtype=torch.bool, device=device)
        return cls(input_batch.idx_mapping_np[:num_reqs], tokens, counts[0], counts[1], grammar, bitmasks, is_finite)

    def check(self, batch_rows: torch.Tensor, values: torch.Tensor) -> None:
        """Notes which of some rows (n,) are not finite, by a number for each (n,) that then is not finite either."""
        self.is_finite[batch_rows] &= values.isfinite()

    def account(self) -> torch.Tensor:
        """(rows,) int32: the passes, or their bitwise complement, which is negative, of rows that are not finite."""
        passes = async_tensor_h2d(self.passes, device=self.is_finite.device)
        return torch.where(self.is_finite, passes, ~passes)


class TwoTowerSampler:
    """Advances canvases by one or more denoiser passes, and autoregressive rows by one token.

    What it tells vLLM: a row that returns w tokens has sampled w, and of a canvas row's scheduled tokens those that
    were not returned are rejected, so that the next step starts at the same position again. A row whose prompt ended in
    this step has scheduled no canvas; what it returns of its first one counts as computed all the same.
    ``num_nans``, which vLLM hands to the scheduler by request, says which towers ran the row: 2 for every denoiser pass
    over its block, 1 for the context tower; and whether its logits were finite, see :meth:`StepOutput.account`.

    ``logprobs_mode`` of the model's configuration says whether log-probabilities are those of the logits as the model
    gives them (``raw``) or of the distribution that tokens are drawn from (``processed``).
    """

    def __init__(self, sampler: Sampler, source: PassSource, model_config: ModelConfig):
        # The runner reads these from any sampler it holds.
        self.req_states = sampler.req_states
        self.sampling_states = sampler.sampling_states
        self.compute_nans = False
        self.penalties_state = SimpleNamespace(output_bin_counts=None)
        self._source, self._table = source, source.table
        self._processors = CustomLogitsProcessors(sampler)
        self._max_model_len, self._max_logprobs = model_config.max_model_len, model_config.max_logprobs
        self._scores_processed = model_config.logprobs_mode.startswith("processed")
        self._scores_as_logits = model_config.logprobs_mode.endswith("logits")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Tells custom logits processors; the model state has added the request to the table."""
        self._processors.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Those of custom logits processors; the table is written directly."""
        self._processors.apply_staged_writes()

    def __call__(self, logits: StepLogits, input_batch: InputBatch) -> SamplerOutput:
        """Samples for one step; ``logits`` are those of the current plan's rows."""
        plan, table = self._source.take_plan(), self._table
        num_reqs, device = input_batch.num_reqs, table.device
        output = StepOutput.of(logits, input_batch, table.engine.canvas_length, device)
        if plan is None:  # memory is being profiled
            self._profile(logits, output)
            nothing = torch.zeros(num_reqs, dtype=torch.int32, device=device)
            return SamplerOutput(output.tokens, None, None, nothing, nothing.clone())
        # Draft tokens are placeholders here, so the scheduler has none to check against a grammar.
        input_batch.has_structured_output_reqs = False
        slots, split = output.slots, plan.split
        output.passes[split.context.batch_rows] = 1
        left = split.still_pending
        table.read[slots] = np.where(left > 0, table.read[slots] + table.pending[slots] - left, 0)
        table.pending[slots] = left
        if logits.context is not None:
            rows = split.context.take(split.next_token[split.context.batch_rows])
            for some, tokens in self._next_tokens(rows, logits.context, logits.context_head, logits.tile, output):
                table.pending_tokens[self._device_slots(slots, rows.take(some)), 0] = tokens
        if plan.blocks is not None:
            self._fill(plan.blocks, split.others_wait, logits, output)

        drafts = np.where(input_batch.is_prefilling_np[:num_reqs], 0, input_batch.num_scheduled_tokens[:num_reqs])
        rejected = ~table.is_ar[slots] * (drafts - output.num_sampled)
        return SamplerOutput(
            sampled_token_ids=output.tokens,
            logprobs_tensors=table.logprobs.collect(slots, output.num_sampled),
            num_nans=output.account(),
            num_sampled=async_tensor_h2d(output.num_sampled, device=device),
            num_rejected=async_tensor_h2d(rejected, device=device, dtype=torch.int32),
        )

    def _profile(self, logits: StepLogits, output: StepOutput) -> None:
        """Samples once for requests that ask for all there is, so that vLLM leaves memory for them."""
        table, width = self._table, self._table.engine.canvas_length
        for mode, most_rows in (("ar", logits.tile), ("mask_diffusion", logits.tile // width)):
            slots = np.arange(min(len(output.slots), most_rows))
            for slot in slots:
                table.add(slot, "", demanding_params(mode, self._max_logprobs))
            lengths = np.full_like(slots, 1 if mode == "ar" else width)
            rows = TowerRows(slots, self._max_model_len - lengths, lengths, slots)
            hidden = logits.denoiser[: rows.num_tokens]
            output.slots = slots
            if mode == "ar":
                list(self._next_tokens(rows, hidden, logits.context_head, logits.tile, output))
            else:
                self._denoise_tiles(self._blocks(rows, slots), hidden, logits, output)
            table.clear()
        prompt = logits.denoiser[:CHUNK_SIZE]
        compute_topk_scores(
            logits.context_head(prompt), max(0, self._max_logprobs), output.tokens.new_zeros(len(prompt))
        )

    def _device_slots(self, slots: np.ndarray, rows: TowerRows) -> torch.Tensor:
        return async_tensor_h2d(slots[rows.batch_rows], device=self._table.device)

    def _fill(self, blocks: Blocks, others_wait: bool, logits: StepLogits, output: StepOutput) -> None:
        """Denoises the blocks, as often as a step may; blocks that are whole drop out."""
        limit, hidden = self._table.engine.denoise_steps_per_engine_step, logits.denoiser
        for count in itertools.count(1):
            converged = self._denoise_tiles(blocks, hidden, logits, output)
            output.passes[blocks.rows.batch_rows] += 2
            if limit == "auto":  # a whole block's request goes on in the next step
                is_last = others_wait or converged.any() or count == AUTO_PASSES_PER_STEP
            else:
                is_last = count == limit
            if is_last or converged.all():
                return
            if changed := converged.any():
                left = np.flatnonzero(~converged)
                blocks = self._blocks(blocks.rows.take(left), blocks.host_slots[left])
            hidden = self._source.denoise_again(blocks, changed)

    def _blocks(self, rows: TowerRows, host_slots: np.ndarray) -> Blocks:
        return Blocks(rows, host_slots, self._table, self._source.staging)

    def _denoise_tiles(
        self, blocks: Blocks, hidden: torch.Tensor, logits: StepLogits, output: StepOutput
    ) -> np.ndarray:
        """One pass over the blocks, a tile of logits at a time; returns which (R,) are whole."""
        head, never = logits.denoiser_head, self._table.engine.mask_token_id
        parts = list(self._parts(head, blocks.host_slots, max(1, logits.tile // self._table.engine.canvas_length)))
        converged = np.zeros(len(blocks), dtype=bool)
        for some, whole_rows in parts:
            part, of_part = blocks, hidden
            if len(parts) > 1:
                part = self._blocks(blocks.rows.take(some), blocks.host_slots[some])
                of_part = hidden[self._index(part.rows.spread(blocks.rows.query_start_loc[some]))]
            scores = head(of_part).float() if whole_rows else head.best(of_part, never)
            converged[some] = self._denoise(part, scores, output)
        if len(parts) > 1:
            blocks.load(self._table)
        return converged

    def _parts(
        self, head: OutputHead, slots: np.ndarray, size: int, has_grammar: np.ndarray | bool = False
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """The rows of requests (n,) that are scored together, at most ``size`` with whole rows of logits.

        All have these with one rank. Where the vocabulary is sharded, only requests that need them do.
        """
        if head.is_sharded:
            needs_logits = self._table.needs_logits(slots) | self._processors.applies[slots] | has_grammar
        else:
            needs_logits = np.ones(len(slots), dtype=bool)
        if len(some := np.flatnonzero(~needs_logits)):
            yield some, False
        whole = np.flatnonzero(needs_logits)
        for start in range(0, len(whole), size):
            yield whole[start : start + size], True

    def _index(self, rows: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(rows, device=self._table.device)

    def _next_tokens(
        self, rows: TowerRows, hidden: torch.Tensor, head: OutputHead, tile: int, output: StepOutput
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Chooses and returns the next tokens of autoregressive rows from hidden states (A, H): rows and tokens."""
        slots = output.slots[rows.batch_rows]
        for some, whole_rows in self._parts(head, slots, tile, output.grammar[rows.batch_rows] >= 0):
            is_all = len(some) == len(rows)
            part, of_part = (rows, hidden) if is_all else (rows.take(some), hidden[self._index(some)])
            batch_rows = self._index(part.batch_rows)
            if whole_rows:
                tokens = self._choose(part, head(of_part).float(), output)
            else:
                best = head.best(of_part)
                tokens = best.tokens
                output.check(batch_rows, best.confidence)
            output.tokens[batch_rows, 0] = tokens
            output.num_sampled[part.batch_rows] = 1
            self._table.pending[slots[some]] = 1
            yield some, tokens

    def _choose(self, rows: TowerRows, logits: torch.Tensor, output: StepOutput) -> torch.Tensor:
        """The next token (A,) of autoregressive rows from fp32 logits (A, V)."""
        table, device = self._table, logits.device
        host_slots, batch_rows = output.slots[rows.batch_rows], rows.batch_rows
        grammar = output.grammar[batch_rows]
        if len(constrained := np.flatnonzero(grammar >= 0)):
            chosen = async_tensor_h2d(constrained, device=device)
            bitmasks = async_tensor_h2d(output.bitmasks[grammar[constrained]], device=device)
            of_grammar = logits[chosen]
            xgrammar.apply_token_bitmask_inplace(of_grammar, bitmasks)
            logits[chosen] = of_grammar
        index, first = np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64)
        rules = None
        if len(ruled := np.flatnonzero(table.rules.has_rules[host_slots])):
            ahead = torch.full((len(ruled), 1), UNDECIDED, device=device)
            ends, each = rows.seq_lens[ruled], index[: len(ruled)]
            rules = self._ruled_rows(host_slots, ruled, ends, ahead, each, first[ruled], ruled)
        scored = self._apply_rules(rules, host_slots, rows.seq_lens, index, first, logits)
        tokens = logits.argmax(-1)
        output.check(self._index(batch_rows), logits.gather(1, tokens[:, None])[:, 0])
        hot = np.flatnonzero(table.is_random[host_slots])
        if len(hot):
            chosen = async_tensor_h2d(hot, device=device)
            options = table.options.rows(async_tensor_h2d(host_slots[hot], device=device))
            position = async_tensor_h2d(rows.seq_lens[hot], device=device)
            zero = torch.zeros_like(position)
            shaped = self._shape(logits[chosen], options, host_slots[hot])
            tokens[chosen] = draw(shaped, uniform(options.seed, position, zero, zero))
            self._score_processed(scored, shaped, hot)
        if scored is not None:
            table.logprobs.record(scored, torch.ones_like(tokens, dtype=torch.bool), tokens, self._scores_as_logits)
        return tokens

    def _denoise(self, blocks: Blocks, scores: torch.Tensor | Best, output: StepOutput) -> np.ndarray:
        """One denoising step of blocks; returns which (R,) are whole now.

        ``scores`` are a pass's fp32 logits (T, V), or what is most probable where nothing else is asked for.

        A whole block is returned, and is pending.
        """
        table, rows, host_slots = self._table, blocks.rows, blocks.host_slots
        mask_token_id = table.engine.mask_token_id
        ruled = scored = None
        if not isinstance(scores, Best):
            suppress_mask_token(scores, mask_token_id)
            ruled = self._ruled_blocks(blocks)
            scored = self._apply_rules(
                ruled, host_slots, rows.starts, rows.row_of_token, rows.offsets, scores, blocks.canvas
            )
            suppress_mask_token(scores, mask_token_id)  # whatever a custom processor did
        best = scores if isinstance(scores, Best) else Best(*predict(scores))
        output.check(self._index(rows.batch_rows), blocks.by_row(best.confidence).sum(1))
        denoised = self._predict(blocks, best, scores, scored)
        commit = self._commit(blocks, denoised)
        positions, canvas = commit.positions, torch.where(commit.positions, denoised.prediction, blocks.canvas)
        if ruled is not None and table.rules.has_phrases[ruled.host_slots].any():
            ahead = _ahead(blocks, canvas, blocks.masked & ~positions)[ruled.of_pass]
            new, confidence = positions[ruled.of_pass], denoised.confidence[ruled.of_pass]
            positions[ruled.of_pass] = table.rules.hold_back(new, confidence, replace(ruled, ahead=ahead))
            canvas = torch.where(positions, denoised.prediction, blocks.canvas)
        converged = ~(blocks.masked & ~positions).any(1)
        if scored is not None:
            chosen, tokens = blocks.by_token(positions), blocks.by_token(denoised.prediction)
            table.logprobs.record(scored, chosen, tokens, self._scores_as_logits)

        # The next rows depend on which blocks are whole.
        done = converged.cpu().numpy()
        blocks.set(canvas, commit.step + 1, mask_token_id)
        if not done.any():
            blocks.store(table)
            return done
        table.step[blocks.slots] = torch.where(converged, 0, blocks.step)
        table.canvas[blocks.slots] = canvas.masked_fill(converged[:, None], mask_token_id)
        pending = table.pending_tokens[blocks.slots]
        table.pending_tokens[blocks.slots] = torch.where(converged[:, None], canvas, pending)
        table.pending[host_slots[done]] = rows.lengths[done]
        output.tokens[self._index(rows.batch_rows[done])] = canvas[self._index(np.flatnonzero(done))]
        output.num_sampled[rows.batch_rows[done]] = rows.lengths[done]
        return done

    def _ruled_rows(
        self,
        host_slots: np.ndarray,
        ruled: np.ndarray,
        starts: np.ndarray,
        ahead: torch.Tensor,
        row: np.ndarray,
        column: np.ndarray,
        index: np.ndarray,
    ) -> RuledRows:
        """The rows ``ruled`` of a pass over ``host_slots``; the others as in :class:`RuledRows`, arrays on the host."""
        device, host_slots = self._table.device, host_slots[ruled]
        slots, of_pass, starts_, row_, column_, index_ = (
            async_tensor_h2d(array, device=device) for array in (host_slots, ruled, starts, row, column, index)
        )
        text = self.req_states.all_token_ids.gpu[:, : starts.max()][slots]
        prompt_lens = async_tensor_h2d(self.req_states.prompt_len.np[host_slots], device=device)
        return RuledRows(host_slots, slots, of_pass, text, prompt_lens, starts_, ahead, row_, column_, index_)

    def _ruled_blocks(self, blocks: Blocks) -> RuledRows | None:
        """The blocks whose requests have rules."""
        ruled = np.flatnonzero(self._table.rules.has_rules[blocks.host_slots])
        if not len(ruled):
            return None
        some, ahead = blocks.rows.take(ruled), _ahead(blocks, blocks.canvas, blocks.masked)
        return self._ruled_rows(
            blocks.host_slots,
            ruled,
            some.starts,
            ahead[async_tensor_h2d(ruled, device=ahead.device)],
            some.row_of_token,
            some.offsets,
            some.spread(blocks.rows.query_start_loc[ruled]),
        )

    def _apply_rules(
        self,
        ruled: RuledRows | None,
        host_slots: np.ndarray,
        starts: np.ndarray,
        row_of_token: np.ndarray,
        columns: np.ndarray,
        logits: torch.Tensor,
        canvas: torch.Tensor | None = None,
    ) -> ScoredTokens | None:
        """Applies rules and custom processors; arguments as in :meth:`CustomLogitsProcessors.apply`.

        Returns the tokens to score, under logits before or after, as ``logprobs_mode`` says.
        """
        scored = None if self._scores_processed else self._scored_tokens(row_of_token, columns, host_slots, logits)
        if ruled is not None:
            self._table.rules.apply(logits, ruled)
        self._processors.apply(logits, host_slots, starts, row_of_token, columns, canvas)
        return self._scored_tokens(row_of_token, columns, host_slots, logits) if self._scores_processed else scored

    def _scored_tokens(
        self, row_of_token: np.ndarray, columns: np.ndarray, host_slots: np.ndarray, logits: torch.Tensor
    ) -> ScoredTokens | None:
        """The tokens of rows that ask for log-probabilities, with their logits as they are now."""
        slots = host_slots[row_of_token]
        index = np.flatnonzero(self._table.logprobs.has_logprobs[slots])
        if not len(index):
            return None
        of_index = logits[async_tensor_h2d(index, device=logits.device)]
        return ScoredTokens(index, slots[index], columns[index], of_index)

    def _score_processed(self, scored: ScoredTokens | None, logits: torch.Tensor, index: np.ndarray) -> None:
        """Scores a pass's tokens at ``index`` under other logits, those they are drawn from, if these are asked for."""
        if scored is not None and self._scores_processed:
            scored.replace(index, logits)

    def _shape(self, logits: torch.Tensor, options: RowOptions, host_slots: np.ndarray) -> torch.Tensor:
        """Tempered and filtered logits of rows with a temperature; ``host_slots`` are theirs."""
        if not self._table.is_filtered[host_slots].any():  # the filters sort the vocabulary
            return logits / options.temperature[:, None]
        return temper_and_filter(logits, options)

    def _predict(
        self, blocks: Blocks, best: Best, scores: torch.Tensor | Best, scored: ScoredTokens | None
    ) -> DenoiserPass:
        """Predictions and what the strategies ask of them, from the scores of the blocks' tokens."""
        table, host_slots = self._table, blocks.host_slots
        needs = frozenset().union(*(table.strategies[index].needs for index, _ in blocks.strategy_rows))
        tokens, confidence = best.tokens, best.confidence
        energy = confidence.log() if "energy" in needs else None
        if table.is_random[host_slots].any():
            row_of_token = blocks.rows.row_of_token
            hot = np.flatnonzero(table.is_random[host_slots][row_of_token])
            chosen = async_tensor_h2d(hot, device=tokens.device)
            of_row = blocks.row_of_token[chosen]
            options = blocks.options.rows(of_row)
            hot_logits = scores[chosen]
            shaped = self._shape(hot_logits, options, host_slots[row_of_token[hot]])
            number = uniform(options.seed, blocks.starts[of_row], blocks.step[of_row], blocks.column[chosen])
            tokens[chosen] = draw(shaped, number)
            confidence[chosen] = probability(hot_logits, tokens[chosen])
            if energy is not None:
                energy[chosen] = options.temperature * shaped.logsumexp(-1) - hot_logits.logsumexp(-1)
            self._score_processed(scored, shaped, hot)

        return DenoiserPass(
            prediction=blocks.by_row(tokens),
            confidence=blocks.by_row(confidence),
            masked=blocks.masked,
            step=blocks.step,
            start=blocks.starts,
            width=blocks.lengths,
            margin=blocks.by_row(margin(scores)) if "margin" in needs else None,
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


def _ahead(blocks: Blocks, canvas: torch.Tensor, undecided: torch.Tensor) -> torch.Tensor:
    """What stands in the blocks (R, S), as :class:`RuledRows` has it."""
    ahead = canvas.masked_fill(undecided, UNDECIDED)
    if blocks.places is not None:
        columns = torch.arange(ahead.shape[1], device=ahead.device)
        ahead = ahead.masked_fill(columns >= blocks.lengths[:, None], NOTHING)
    return ahead


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
