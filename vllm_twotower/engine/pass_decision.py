"""What a pass decides, on the device: the tokens behind texts and drafts, and the canvases after it.

The same functions serve passes that run eagerly and passes that are captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_twotower.model.step_logits import OutputHead
from vllm_twotower.sampling.strategies import Commit, DenoiserPass

from .decision import Decision, Prediction
from .logit_rules import RuledRows, RuleTable
from .request_table import RequestTable
from .targets import Canvases, NextTokens, Targets


@dataclass
class Decided:
    """What a pass decides for R rows.

    ``outcome`` (R, 2 + S) int64, so that one copy brings it to the host: new tokens of a text or draft, or 1 for a
    canvas that is whole; whether all logits are finite that its tokens were chosen by; and what stands there now.
    If rows are traced, ``traced`` makes (R, 2, S) fp32 of it, the tokens' probabilities and their runners-up's, and of
    canvases also the time (R,) that the pass was told.
    """

    outcome: Tensor
    traced: Callable[[], tuple[Tensor, ...]] | None = None

    @classmethod
    def of(cls, part: Targets, predicted: Prediction, counts: Tensor, is_finite: Tensor, tokens: Tensor) -> Decided:
        """From counts (R,), is_finite (R,) bool and tokens (R, S)."""
        decided = cls(torch.cat((counts[:, None].long(), is_finite[:, None].long(), tokens), 1))
        confidence, runner_up = predicted.confidence, predicted.runner_up
        if confidence is not None and runner_up is not None:

            def traced() -> tuple[Tensor, ...]:
                columns = (confidence, runner_up())
                probabilities = torch.stack([values.view_as(tokens) for values in columns], 1)
                return (probabilities, part.times) if isinstance(part, Canvases) else (probabilities,)

            decided.traced = traced
        return decided


class PassDecision:
    """Decides by what a request asks for; ``text`` (max_num_reqs, max_model_len) int32 are the tokens of all."""

    def __init__(self, decision: Decision, table: RequestTable, text: Tensor):
        self._decision, self._table, self._text = decision, table, text

    def next_tokens(
        self, targets: NextTokens, hidden: Tensor, head: OutputHead, tile: int
    ) -> Iterator[tuple[NextTokens, Decided]]:
        """The tokens that the context head gives from ``hidden`` (A, H) behind texts, or behind tokens of drafts.

        Of a draft the first are new, up to the first that differs from it. The newest token is put behind the text.
        """
        width = targets.rows_together
        for part, predicted in self._decision.predict(targets, hidden, head, tile):
            tokens, is_finite = (values.view(-1, width) for values in (predicted.tokens, predicted.is_finite))
            counts = part.num_new(tokens)
            is_new = torch.arange(width, device=tokens.device) < counts[:, None]
            self._decision.record(part, predicted, is_new.flatten())
            self._put_newest(part, tokens, counts)
            yield part, Decided.of(part, predicted, counts, (is_finite | ~is_new).all(1), tokens)

    def _put_newest(self, part: NextTokens, tokens: Tensor, counts: Tensor) -> None:
        """Writes the last new one of the tokens (n, W); what is before it in a draft is in the text already."""
        width = part.rows_together
        newest = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0].to(self._text.dtype)
        at = (part.rows.text_slots(self._text)[::width], part.starts[::width] + counts - 1)
        if part.rows.has_padding:  # rows of no request write what is there
            newest = torch.where(part.rows.lengths[::width] > 0, newest, self._text[at])
        self._text[at] = newest

    def canvases(
        self, canvases: Canvases, hidden: Tensor, head: OutputHead, tile: int
    ) -> Iterator[tuple[Canvases, Decided]]:
        """Canvases after the pass whose hidden states are (T, H); they are put into the table."""
        needs = frozenset({"confidence"}).union(*(strategy.needs for strategy, _ in canvases.strategy_rows))
        for part, predicted in self._decision.predict(canvases, hidden, head, tile, needs):
            filled = fill_canvases(part, predicted, self._table.rules)
            self._decision.record(part, predicted, filled.positions.flatten())
            part.store(filled.canvas, filled.step, filled.whole)
            is_finite = part.by_row(predicted.is_finite).all(1)
            yield part, Decided.of(part, predicted, filled.whole, is_finite, filled.canvas)


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
    assert predicted.confidence is not None
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
            assert rows is not None
            commit = strategy.commit(denoised.rows(rows), part.options.rows(rows))
            result.positions[rows], result.step[rows] = commit.positions, commit.step
    is_last = result.step >= part.options.max_steps - 1
    return Commit((result.positions | is_last[:, None]) & part.masked, result.step)
