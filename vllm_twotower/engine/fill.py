"""How the blocks of a step are filled: pass after pass, until the step must end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.states import RequestState

from vllm_twotower.model.step_logits import StepLogits
from vllm_twotower.sampling.strategies import Commit, DenoiserPass

from .decision import Decision, Prediction
from .logit_rules import RuledRows, RuleTable
from .pass_plan import PassPlan
from .request_table import RequestTable
from .step_rows import StepRows
from .targets import Canvases, DraftedTokens, NextTokens


class PassSource(Protocol):
    """Where further passes of a step come from: the model state."""

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """The next pass of the step that was taken."""

    def commit_drafts(self, plan: PassPlan, counts: Tensor) -> None:
        """Lets the context tower's states go on by so many tokens (n,) of the drafts that the pass has verified."""


class StepFill:
    """Fills the blocks of one step; ``tokens`` (rows, S) on the device are what has come of it so far.

    ``is_finite`` (rows,), on the device: whether all logits that the row's tokens were chosen by are.
    """

    def __init__(
        self, rows: StepRows, table: RequestTable, states: RequestState, decision: Decision, source: PassSource
    ):
        self._rows, self._table, self._text = rows, table, states.all_token_ids
        self._decision, self._source = decision, source
        shape = (len(rows), table.engine.canvas_length)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=table.device)
        self.is_finite = torch.ones(len(rows), dtype=torch.bool, device=table.device)

    def run(self, plan: PassPlan, logits: StepLogits, bitmasks: dict[int, np.ndarray]) -> None:
        """Goes on from the first pass, whose hidden states are ``logits``; ``bitmasks`` are the grammars' by row."""
        for count in itertools.count(1):
            if plan.next_tokens is not None:
                plan.next_tokens.bitmasks = bitmasks
                self.add_next_tokens(plan.next_tokens, logits)
            if plan.drafted is not None:
                self.verify(plan, logits)
            if plan.canvases is not None:
                self.denoise(plan.canvases, logits)
            if self._rows.is_over_after(count):
                return
            plan, logits = self._source.run_pass()

    def add_next_tokens(self, targets: NextTokens, logits: StepLogits) -> None:
        """Adds the tokens that the context head gives rows (A,)."""
        for part, predicted in self._decision.predict(targets, logits.context, logits.context_head, logits.tile):
            count, rows = len(part), part.rows
            tokens = predicted.tokens[:count]
            self._check(part, predicted)
            self._text.gpu[part.slots[:count], part.starts[:count]] = tokens.to(self._text.gpu.dtype)
            self.tokens[rows.batch_rows[:count], part.on_device(part.num_returned)] = tokens
            self._decision.record(part, predicted, torch.ones_like(tokens, dtype=torch.bool))
            stops = zip(part.host_slots, tokens.tolist(), strict=True)
            ends = np.array([token in self._table.stops[slot] for slot, token in stops])
            self._rows.add_tokens(rows.host.batch_rows, 1, ends)

    def verify(self, plan: PassPlan, logits: StepLogits) -> None:
        """Adds the tokens of drafts that the context head would have given too, and the one behind them."""
        read = self._rows.read.copy()
        for part, predicted in self._decision.predict(plan.drafted, logits.drafts, logits.context_head, logits.tile):
            width, count = part.rows_together, len(part) // part.rows_together
            tokens = predicted.tokens.view(-1, width)
            counts = self._until_end(part, torch.cat((num_accepted(part, tokens)[:, None], tokens), 1)[:count].tolist())
            on_device, batch_rows = part.on_device(counts), part.rows.host.batch_rows[::width]
            tokens, slots, starts = tokens[:count], part.slots[::width][:count], part.starts[::width][:count]
            newest = tokens.gather(1, on_device[:, None] - 1)[:, 0]
            self._text.gpu[slots, starts + on_device - 1] = newest.to(self._text.gpu.dtype)
            of_batch = part.rows.batch_rows[::width][:count]
            self.tokens[of_batch[:, None], part.on_device(part.num_returned).view(-1, width)] = tokens
            is_new = torch.arange(width, device=tokens.device) < on_device[:, None]
            self._decision.record(part, predicted, is_new.flatten())
            self.is_finite[of_batch] &= (predicted.is_finite.view(-1, width)[:count] | ~is_new).all(1)
            self._rows.add_verified(batch_rows, counts)
        counts = (self._rows.read - read)[plan.drafts.rows.host.batch_rows]
        self._source.commit_drafts(plan, plan.drafted.on_device(counts))

    def _until_end(self, part: DraftedTokens, drafts: list[list[int]]) -> np.ndarray:
        """How many tokens of drafts are new: so many as each begins with, but none behind one that ends its request."""
        ends = [
            next((i for i in range(1, count) if tokens[i - 1] in self._table.stops[slot]), count)
            for (count, *tokens), slot in zip(drafts, part.host_slots[:: part.rows_together], strict=True)
        ]
        return np.array(ends)

    def denoise(self, canvases: Canvases, logits: StepLogits) -> None:
        """Advances canvases by the pass whose hidden states (T, H) are ``logits.denoiser``."""
        needs = frozenset({"confidence"}).union(*(strategy.needs for strategy, _ in canvases.strategy_rows))
        predictions = self._decision.predict(canvases, logits.denoiser, logits.denoiser_head, logits.tile, needs)
        for part, predicted in predictions:
            filled = fill_canvases(part, predicted, self._table.rules)
            count, rows = len(part), part.rows
            self._check(part, predicted)
            self._decision.record(part, predicted, filled.positions.flatten())
            part.store(filled.canvas, filled.step, filled.whole)
            self.tokens[rows.batch_rows[:count], : rows.width] = filled.canvas[:count]
            # The next pass's rows depend on which blocks are whole.
            whole = np.flatnonzero(filled.whole[:count].cpu().numpy())
            drafts = whole[~part.is_returned[whole]]
            if len(drafts):
                self._put_drafts(part, filled.canvas, part.on_device(drafts))
            self._rows.add_canvases(rows.host.batch_rows[whole])

    def _put_drafts(self, part: Canvases, canvas: Tensor, index: Tensor) -> None:
        """Writes the drafts ``index`` (n,) of the canvases (R, S) behind the text; what is rejected is overwritten."""
        last = (part.rows.lengths[index] - 1)[:, None]
        columns = torch.minimum(torch.arange(1, canvas.shape[1], device=canvas.device), last)
        tokens = canvas[index].gather(1, columns).to(self._text.gpu.dtype)
        self._text.gpu[part.slots[index, None], part.starts[index, None] + columns] = tokens

    def _check(self, part: Canvases | NextTokens, predicted: Prediction) -> None:
        """Notes which rows had logits that are not finite."""
        count = len(part)
        self.is_finite[part.rows.batch_rows[:count]] &= part.by_row(predicted.is_finite)[:count].all(1)


def num_accepted(part: DraftedTokens, tokens: Tensor) -> Tensor:
    """How many of the ``tokens`` (D, W) behind those of drafts are new (D,): those up to the first other one."""
    in_draft = torch.arange(1, part.rows_together, device=tokens.device) < part.draft_lengths[:, None]
    is_same = (tokens[:, :-1] == part.drafts[:, 1:]) & in_draft
    return torch.minimum(1 + is_same.cumprod(1).sum(1), part.draft_lengths)


@dataclass
class FilledCanvases:
    """What a pass makes of canvases: the ``positions`` (R, S) bool that it commits, the ``canvas`` (R, S) then and its
    next ``step`` (R,); where nothing is left to fill it is ``whole`` (R,)."""

    positions: Tensor
    canvas: Tensor
    step: Tensor
    whole: Tensor


def fill_canvases(part: Canvases, predicted: Prediction, rules: RuleTable) -> FilledCanvases:
    """Commits what the strategies say of a prediction."""
    denoised = DenoiserPass(
        prediction=part.by_row(predicted.tokens),
        confidence=part.by_row(predicted.confidence),
        masked=part.masked,
        step=part.step,
        start=part.starts,
        width=part.rows.lengths,
        margin=None if predicted.margin is None else part.by_row(predicted.margin),
        energy=None if predicted.energy is None else part.by_row(predicted.energy),
    )
    commit = _chosen(part, denoised)
    positions = commit.positions
    ruled = predicted.ruled
    if ruled is not None and rules.has_phrases[ruled.host_slots].any():
        positions = _without_phrases(part, denoised, positions, ruled, rules)
    canvas = torch.where(positions, denoised.prediction, part.canvas)
    whole = ~(part.masked & ~positions).any(1)
    return FilledCanvases(positions, canvas, commit.step + 1, whole)


def _without_phrases(
    part: Canvases, denoised: DenoiserPass, positions: Tensor, ruled: RuledRows, rules: RuleTable
) -> Tensor:
    """The positions (R, S) to commit without those that would make up a banned phrase."""
    index = ruled.of_pass
    canvas = torch.where(positions, denoised.prediction, part.canvas)
    ahead = part.ahead_of(canvas, part.masked & ~positions)[index]
    allowed = rules.hold_back(positions[index], denoised.confidence[index], replace(ruled, ahead=ahead))
    return positions.index_copy(0, index, allowed)


def _chosen(part: Canvases, denoised: DenoiserPass) -> Commit:
    """What each row's strategy commits; in the last pass that a request allows, all that is left."""
    strategy, rows = part.strategy_rows[0]
    if rows is None:
        result = strategy.commit(denoised, part.options)
    else:
        result = Commit(torch.zeros_like(part.masked), part.step.clone())
        for strategy, rows in part.strategy_rows:
            commit = strategy.commit(denoised.rows(rows), part.options.rows(rows))
            result.positions[rows], result.step[rows] = commit.positions, commit.step
    is_last = result.step >= part.options.max_steps - 1
    return Commit((result.positions | is_last[:, None]) & part.masked, result.step)
