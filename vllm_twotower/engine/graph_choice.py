"""Which runs of a pass are replayed as CUDA graphs, and why others are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .metrics import EAGER_REASONS
from .pass_graphs import PassDescriptor, PassGraphs, PassKind
from .request_table import RequestTable
from .step_rows import StepRows
from .tower_rows import TowerRows


class GraphChoice:
    """Finds the graphs for a pass; ``needs_logits`` says which requests in slots (n,) are not greedy and plain."""

    def __init__(self, graphs: PassGraphs, table: RequestTable, needs_logits: Callable[[np.ndarray], np.ndarray]):
        self.graphs, self._table, self._needs_logits = graphs, table, needs_logits

    def find(
        self, rows: StepRows, prefill_len: np.ndarray, context: TowerRows, gets_token: np.ndarray, *others: TowerRows
    ) -> tuple[PassDescriptor | None, ...]:
        """The graphs of the three runs of a pass, None for a run that has none; notes the reason with its rows.

        Args: prefill_len (R,), the lengths of the prompts of vLLM's batch; gets_token (n,), which of the ``context``
        rows get a next token; ``others`` are the drafts and the canvases.
        """
        drafts, canvases = others
        return (
            self._find(rows, context, *self._of_context(rows, prefill_len, context, gets_token)),
            self._find(rows, drafts, PassKind.VERIFY, self._is_plain(rows, drafts)),
            self._find(rows, canvases, PassKind.DENOISE, self._is_plain(rows, canvases, has_strategy=True)),
        )

    def _of_context(
        self, rows: StepRows, prefill_len: np.ndarray, context: TowerRows, gets_token: np.ndarray
    ) -> tuple[PassKind | None, bool]:
        """The kind of the context tower's run, None for a mixed one; and whether its requests are plain."""
        slots = rows.slots[context.batch_rows]
        if not (context.starts > 0).all() or (context.lengths > self._table.engine.canvas_length).any():
            return None, True
        is_prompt = context.starts < prefill_len[context.batch_rows]
        if (self._table.scores_prompt[slots] & is_prompt).any():
            return PassKind.READ, False
        if not gets_token.any():
            return PassKind.READ, True
        if gets_token.all() and (context.lengths == 1).all():
            return PassKind.NEXT_TOKEN, self._is_plain(rows, context)
        return None, True

    def _is_plain(self, rows: StepRows, of_run: TowerRows, has_strategy: bool = False) -> bool:
        """Whether all rows are what a graph knows: greedy, without rules, and canvases of the first strategy."""
        slots = rows.slots[of_run.batch_rows]
        is_plain = ~self._needs_logits(slots)
        if has_strategy:
            is_plain &= self._table.strategy[slots] == 0
        return bool(is_plain.all())

    def _find(self, rows: StepRows, of_run: TowerRows, kind: PassKind | None, is_plain: bool) -> PassDescriptor | None:
        if not len(of_run):
            return None
        reason, desc = "mixed", None
        if kind in self.graphs.kinds:
            desc = self.graphs.find(kind, len(of_run)) if is_plain else None
            reason = "many" if is_plain else "options"
        if desc is None:
            rows.why_eager[of_run.batch_rows] = 1 + EAGER_REASONS.index(reason)
        return desc
