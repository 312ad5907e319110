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

    def commit_drafts(self, plan: PassPlan, counts: np.ndarray) -> None:
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
                self.add_next_tokens(plan.next_tokens, logits.context, logits)
            if plan.drafted is not None:
                self.add_next_tokens(plan.drafted, logits.drafts, logits)
                self._source.commit_drafts(plan, self._rows.num_new[plan.drafts.rows.host.batch_rows])
            if plan.canvases is not None:
                self.denoise(plan.canvases, logits)
            if self._rows.is_over_after(count):
                return
            plan, logits = self._source.run_pass()

    def add_next_tokens(self, targets: NextTokens, hidden: Tensor, logits: StepLogits) -> None:
        """Adds the tokens that the context head gives from ``hidden`` (A, H) behind texts, or behind tokens of drafts.

        Of a draft as many are new as it holds, up to one that ends its request.
        """
        width = targets.rows_together
        for part, predicted in self._decision.predict(targets, hidden, logits.context_head, logits.tile):
            count, rows = len(part), part.rows
            tokens, is_finite = (values[:count].view(-1, width) for values in (predicted.tokens, predicted.is_finite))
            counts, ends = self._until_end(part, tokens)
            slots, starts, batch_rows = (values[:count:width] for values in (part.slots, part.starts, rows.batch_rows))
            on_device = part.on_device(counts)
            newest = tokens.gather(1, on_device[:, None] - 1)[:, 0]
            # What is before it in a draft is in the text already.
            self._text.gpu[slots, starts + on_device - 1] = newest.to(self._text.gpu.dtype)
            self.tokens[rows.batch_rows[:count], part.on_device(part.num_returned)] = predicted.tokens[:count]
            is_new = torch.arange(width, device=tokens.device) < on_device[:, None]
            self._decision.record(part, predicted, is_new.flatten())
            self.is_finite[batch_rows] &= (is_finite | ~is_new).all(1)
            self._rows.add_tokens(rows.host.batch_rows[::width], counts, ends)

    def _until_end(self, part: NextTokens, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How many of the ``tokens`` (n, W) are new (n,), and which rows' last new one ends their request (n,)."""
        slots = part.host_slots[:: part.rows_together]
        on_host = torch.cat((part.num_new(tokens)[:, None], tokens), 1).tolist()
        counts, ends = [], []
        for (count, *row), slot in zip(on_host, slots, strict=True):
            stops = self._table.stops[slot]
            counts.append(next((n for n in range(1, count) if row[n - 1] in stops), count))
            ends.append(row[counts[-1] - 1] in stops)
        return np.array(counts), np.array(ends)

    def denoise(self, canvases: Canvases, logits: StepLogits) -> None:
        """Advances canvases by the pass whose hidden states (T, H) are ``logits.denoiser``."""
        needs = frozenset({"confidence"}).union(*(strategy.needs for strategy, _ in canvases.strategy_rows))
        predictions = self._decision.predict(canvases, logits.denoiser, logits.denoiser_head, logits.tile, needs)
        for part, predicted in predictions:
            filled = fill_canvases(part, predicted, self._table.rules)
            count, rows = len(part), part.rows
            self.is_finite[rows.batch_rows[:count]] &= part.by_row(predicted.is_finite)[:count].all(1)
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
