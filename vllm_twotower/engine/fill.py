"""How the blocks of a step are filled: pass after pass, until the step must end."""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twotower.model.step_logits import StepLogits

from .pass_decision import Decided, PassDecision
from .pass_graphs import PassKind, Replay
from .pass_plan import PassPlan
from .request_table import RequestTable
from .step_rows import StepRows
from .tower_rows import TowerRows


class PassSource(Protocol):
    """Where further passes of a step come from: the model state."""

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """The next pass of the step that was taken."""

    def commit_drafts(self, plan: PassPlan, counts: np.ndarray) -> None:
        """Lets the context tower's states go on by so many tokens (n,) of the drafts that the pass has verified."""


class StepFill:
    """Fills the blocks of one step; ``tokens`` (rows, S) int64 on the host are what has come of it so far.

    ``is_finite`` (rows,): whether all logits that the row's tokens were chosen by are.
    """

    def __init__(self, rows: StepRows, table: RequestTable, text: Tensor, decision: PassDecision, source: PassSource):
        self._rows, self._table, self._text = rows, table, text
        self._decision, self._source = decision, source
        self.tokens = np.zeros((len(rows), table.engine.canvas_length), dtype=np.int64)
        self.is_finite = np.ones(len(rows), dtype=bool)

    def run(self, plan: PassPlan, logits: StepLogits, bitmasks: dict[int, np.ndarray]) -> None:
        """Goes on from the first pass, whose hidden states are ``logits``; ``bitmasks`` are the grammars' by row."""
        for count in itertools.count(1):
            self._add_next_tokens(plan, logits, bitmasks)
            self._add_drafted(plan, logits)
            self._add_canvases(plan, logits)
            if self._rows.is_over_after(count):
                return
            plan, logits = self._source.run_pass()

    def _add_next_tokens(self, plan: PassPlan, logits: StepLogits, bitmasks: dict[int, np.ndarray]) -> None:
        """Adds the tokens that the context head gives behind texts."""
        if isinstance(plan.context, Replay) and plan.context.desc.kind is PassKind.NEXT_TOKEN:
            self._add_tokens(plan.context.rows.host.batch_rows, plan.context.decided)
        elif plan.next_tokens is not None:
            assert logits.context is not None
            plan.next_tokens.bitmasks = bitmasks
            head = logits.context_head, logits.tile
            for part, decided in self._decision.next_tokens(plan.next_tokens, logits.context, *head):
                self._add_tokens(part.rows.host.batch_rows, decided)

    def _add_drafted(self, plan: PassPlan, logits: StepLogits) -> None:
        """Adds the tokens that the context head gives behind tokens of drafts."""
        if isinstance(plan.drafts, Replay):
            self._add_tokens(plan.drafts.rows.host.batch_rows, plan.drafts.decided)
        elif plan.drafted is not None:
            assert plan.drafts is not None
            assert logits.drafts is not None
            head = logits.context_head, logits.tile
            for part, decided in self._decision.next_tokens(plan.drafted, logits.drafts, *head):
                self._add_tokens(part.rows.host.batch_rows[:: part.rows_together], decided)
            self._source.commit_drafts(plan, self._rows.num_new[plan.drafts.rows.host.batch_rows])

    def _add_canvases(self, plan: PassPlan, logits: StepLogits) -> None:
        """Advances canvases by a pass of the denoiser."""
        if isinstance(plan.canvas, Replay):
            self._add_filled(plan.canvas.rows.host, plan.canvas.decided)
        elif plan.canvases is not None:
            assert logits.denoiser is not None
            assert logits.denoiser_head is not None
            head = logits.denoiser_head, logits.tile
            for part, decided in self._decision.canvases(plan.canvases, logits.denoiser, *head):
                self._add_filled(part.rows.host, decided)

    def _add_tokens(self, batch_rows: np.ndarray, decided: Decided) -> None:
        """Adds the first of the tokens of rows (n,) that are new, up to one that ends its request."""
        outcome = decided.outcome[: len(batch_rows)].cpu().numpy()
        counts, ends = self._until_end(self._rows.slots[batch_rows], outcome)
        row, column = np.nonzero(np.arange(outcome.shape[1] - 2) < counts[:, None])
        places = self._rows.num_new[batch_rows[row]] + column
        self.tokens[batch_rows[row], places] = outcome[row, 2 + column]
        self.is_finite[batch_rows] &= outcome[:, 1].astype(bool)
        if decided.traced is not None:
            (probabilities,) = (values.cpu().numpy() for values in decided.traced())
            slots = self._rows.slots[batch_rows[row]]
            self._table.traces.add_tokens(slots, places, probabilities[row, :, column])
        self._rows.add_tokens(batch_rows, counts, ends)

    def _until_end(self, slots: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens of rows (n,) are new (n,), and which rows' last new one ends their request (n,)."""
        counts, ends = [], []
        for slot, (count, _, *tokens) in zip(slots, outcome.tolist(), strict=True):
            stops = self._table.stops[slot]
            counts.append(next((n for n in range(1, count) if tokens[n - 1] in stops), count))
            ends.append(tokens[counts[-1] - 1] in stops)
        return np.array(counts), np.array(ends)

    def _add_filled(self, rows: TowerRows, decided: Decided) -> None:
        """Adds canvases (n,) that are whole; of the others the next pass goes on with what is in the table."""
        # The next pass's rows depend on which blocks are whole.
        outcome = decided.outcome[: len(rows)].cpu().numpy()
        batch_rows, canvas = rows.batch_rows, outcome[:, 2:]
        self.is_finite[batch_rows] &= outcome[:, 1].astype(bool)
        if decided.traced is not None:
            of_pass = [values[: len(rows)].cpu().numpy() for values in decided.traced()]
            mask = self._table.engine.mask_token_id
            self._table.traces.add_pass(self._rows.slots[batch_rows], rows, canvas, mask, *of_pass)
        whole = np.flatnonzero(outcome[:, 0])
        is_draft = self._rows.is_verified[batch_rows[whole]]
        returned, drafts = whole[~is_draft], whole[is_draft]
        self.tokens[batch_rows[returned], : canvas.shape[1]] = canvas[returned]
        if len(drafts):
            self._put_drafts(rows.take(drafts), canvas[drafts])
        self._rows.add_canvases(batch_rows[whole])

    def _put_drafts(self, rows: TowerRows, canvas: np.ndarray) -> None:
        """Writes drafts (n, S) behind the texts; what is rejected is overwritten."""
        columns = np.arange(canvas.shape[1])
        # The first is the text's newest token, though the denoiser has filled it if that is the mask token.
        row, column = np.nonzero((columns > 0) & (columns < rows.lengths[:, None]))
        slots = self._rows.slots[rows.batch_rows]
        written = np.stack((slots[row], rows.starts[row] + column, canvas[row, column]))
        slots, positions, tokens = async_tensor_h2d(written, device=self._text.device)
        self._text[slots, positions] = tokens.to(self._text.dtype)
