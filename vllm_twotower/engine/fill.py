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
from .targets import Canvases, NextTokens


class PassSource(Protocol):
    """Where further passes of a step come from: the model state."""

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """The next pass of the step that was taken."""


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
            whole = rows.host.batch_rows[filled.whole[:count].cpu().numpy()]
            self._rows.add_tokens(whole, self._rows.room[whole], np.ones(len(whole), dtype=bool))

    def _check(self, part: Canvases | NextTokens, predicted: Prediction) -> None:
        """Notes which rows had logits that are not finite."""
        count = len(part)
        self.is_finite[part.rows.batch_rows[:count]] &= part.by_row(predicted.is_finite)[:count].all(1)


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
