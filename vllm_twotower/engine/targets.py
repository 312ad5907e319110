"""The positions that a pass has logits for: the next one of a row, those behind its draft, or those of its canvas."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
import xgrammar
from torch import Tensor

from vllm_twotower.sampling.prediction import suppress_mask_token
from vllm_twotower.sampling.strategies import Strategy

from .logit_rules import NOTHING, UNDECIDED
from .request_table import RequestTable
from .tower_rows import DeviceRows


class Targets:
    """R rows of a pass with S positions each, T = R * S in all, from ``rows.starts`` on.

    ``host_slots`` and, on the device, ``slots`` (R,) are their requests' places in the table.
    """

    canvas: Tensor | None = None
    """What stands at the positions (R, S), where a row has several."""
    never: int | None = None
    """The token that can stand nowhere."""
    rows_together: int = 1
    """So many rows, one after the other, are predicted in one go."""

    def __init__(self, rows: DeviceRows, table: RequestTable):
        self.rows, self.table = rows, table
        self.host_slots, self.slots, self.starts = rows.host_slots, rows.slots, rows.starts
        self.options = table.options.rows(self.slots)

    def __len__(self) -> int:
        """The rows that requests have, without those that fill up a bucket."""
        return len(self.host_slots)

    def on_device(self, values: np.ndarray) -> Tensor:
        """The values on the targets' device."""
        return self.rows.on_device(values)

    @cached_property
    def host_row(self) -> np.ndarray:
        """(T,): the row each position belongs to."""
        return np.repeat(np.arange(len(self)), self.rows.even_width)

    @cached_property
    def host_column(self) -> np.ndarray:
        """(T,): each position's place in its row."""
        return np.tile(np.arange(self.rows.width), len(self))

    @property
    def row(self) -> Tensor:
        """(T,) on the device: the row each position belongs to, of the rows too that fill up a bucket."""
        return self.rows.row

    @cached_property
    def column(self) -> Tensor:
        """(T,) on the device: each position's place in its row."""
        return torch.arange(self.rows.even_width, device=self.slots.device).repeat(len(self.rows))

    def positions_of(self, index: np.ndarray) -> np.ndarray:
        """Where the positions of some rows (n,) lie among all, row after row: (n * S,)."""
        width = self.rows.width
        return (index[:, None] * width + np.arange(width)).ravel()

    def take(self, index: np.ndarray) -> Targets:
        """Some of the rows."""
        return type(self)(self.rows.take(index), self.table)

    def restrict(self, logits: Tensor) -> None:
        """Makes what can never stand there impossible, in place, in logits (T, V)."""

    @property
    def has_grammar(self) -> np.ndarray:
        """(R,): the rows whose tokens a grammar restricts."""
        return np.zeros(len(self), dtype=bool)

    @property
    def returned_column(self) -> np.ndarray:
        """(T,): each position's place in what the step returns of its row."""
        return self.host_column

    @property
    def is_returned(self) -> np.ndarray:
        """(R,): the rows whose tokens may be returned; others are drafts."""
        return np.ones(len(self), dtype=bool)

    def counters(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the random numbers of positions (n,) depend on beside the seed."""
        return self.starts[row], torch.zeros_like(row), column

    @property
    def is_traced(self) -> bool:
        """Whether a request among them has a trace."""
        return bool(self.table.traces.is_traced[self.host_slots].any())

    def by_row(self, values: Tensor) -> Tensor:
        """(T,) -> (R, S)."""
        return values.view(-1, self.rows.even_width)

    def ahead(self) -> Tensor:
        """What stands in the rows from ``starts`` on (R, S), as :class:`~.logit_rules.RuledRows` has it."""
        return torch.full((len(self), 1), UNDECIDED, device=self.slots.device)


class NextTokens(Targets):
    """The position behind each row's text. On the host: ``num_returned`` (R,), the tokens that the step has for the
    row already, and by row of vLLM's batch the ``bitmasks``, (V / 32,) int32 each, of grammars."""

    def __init__(
        self,
        rows: DeviceRows,
        table: RequestTable,
        num_returned: np.ndarray,
        bitmasks: Mapping[int, np.ndarray] | None = None,
    ):
        super().__init__(rows, table)
        self.num_returned, self.bitmasks = num_returned, bitmasks or {}

    def take(self, index: np.ndarray) -> NextTokens:
        return NextTokens(self.rows.take(index), self.table, self.num_returned[index], self.bitmasks)

    @property
    def has_grammar(self) -> np.ndarray:
        return np.isin(self.rows.host.batch_rows, list(self.bitmasks))

    @property
    def returned_column(self) -> np.ndarray:
        return self.num_returned

    def num_new(self, tokens: Tensor) -> Tensor:
        """How many of the ``tokens`` (n, W) are new (n,)."""
        return torch.ones_like(tokens[:, 0])

    def restrict(self, logits: Tensor) -> None:
        if not self.bitmasks:
            return
        rows = np.flatnonzero(self.has_grammar)
        if len(rows):
            index = self.on_device(rows)
            of_rows = logits[index]
            bitmasks = np.stack([self.bitmasks[row] for row in self.rows.host.batch_rows[rows]])
            xgrammar.apply_token_bitmask_inplace(of_rows, self.on_device(bitmasks))
            logits[index] = of_rows


class DraftedTokens(NextTokens):
    """The positions behind each of the W tokens of drafts, each a row of its own.

    So they are decided as the next tokens of requests are whose text ends there. Rows of a draft that are behind its
    last token mean nothing.
    """

    def __init__(self, rows: DeviceRows, table: RequestTable, drafts: Tensor):
        """``rows`` as :meth:`DeviceRows.behind_each_token` gives them; ``drafts`` (D, W), of ``draft_lengths`` (D,)."""
        self.drafts, self.rows_together = drafts, drafts.shape[1]
        self.draft_lengths = rows.lengths[:: self.rows_together]
        super().__init__(rows, table, np.arange(len(rows.host)) % self.rows_together)

    def take(self, index: np.ndarray) -> DraftedTokens:
        """The rows of some drafts, each draft whole."""
        of_drafts = index[:: self.rows_together] // self.rows_together
        return DraftedTokens(self.rows.take(index), self.table, self.drafts[self.on_device(of_drafts)])

    def num_new(self, tokens: Tensor) -> Tensor:
        """Those up to the first that is another than the draft has in its place."""
        lengths = self.draft_lengths[: len(tokens)]
        in_draft = torch.arange(1, self.rows_together, device=tokens.device) < lengths[:, None]
        is_same = (tokens[:, :-1] == self.drafts[: len(tokens), 1:]) & in_draft
        return torch.minimum(1 + is_same.cumprod(1).sum(1), lengths)


class Canvases(Targets):
    """The canvases of blocks that the denoiser fills: those of the table, as the last pass has left them.

    ``canvas`` (R, S), ``masked`` (R, S) bool, the positions still to fill, and ``step`` (R,), the passes a block has
    had. S is the width of the pass; behind a shorter canvas nothing is masked. The canvas of a block that is to be
    verified is a draft, which begins with the request's newest token.
    """

    canvas: Tensor
    never: int

    def __init__(self, rows: DeviceRows, table: RequestTable):
        super().__init__(rows, table)
        self.never = table.engine.mask_token_id
        self._strategy = table.strategy[self.host_slots]
        self.canvas, self.step = table.canvas[self.slots, : rows.width], table.step[self.slots]
        self.masked = self.canvas == self.never
        if rows.has_padding:
            self.masked &= ~rows.is_inert

    def has_rows_of(self, other: Canvases) -> bool:
        """Whether both are canvases of the same rows of vLLM's batch."""
        return np.array_equal(self.rows.host.batch_rows, other.rows.host.batch_rows)

    def store(self, canvas: Tensor, step: Tensor, whole: Tensor) -> None:
        """Puts canvases (R, S) into the table; where they are ``whole`` (R,) empty ones for the next blocks."""
        count = len(self)
        slots, whole = self.slots[:count], whole[:count]
        self.table.canvas[slots, : self.rows.width] = canvas[:count].masked_fill(whole[:, None], self.never)
        self.table.step[slots] = step[:count].masked_fill(whole, 0)

    def restrict(self, logits: Tensor) -> None:
        suppress_mask_token(logits, self.never)

    @property
    def is_returned(self) -> np.ndarray:
        return ~self.table.verifies[self.host_slots]

    def counters(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a draft those of the next tokens that it foresees: so it draws the same token if the two towers agree."""
        starts, step = self.starts[row], self.step[row]
        if self.is_returned.all():
            return starts, step, column
        is_draft = self.table.is_draft[self.slots][row]
        return starts + column * is_draft, step * ~is_draft, column * ~is_draft

    def ahead(self) -> Tensor:
        return self.ahead_of(self.canvas, self.masked)

    def ahead_of(self, canvas: Tensor, undecided: Tensor) -> Tensor:
        """:meth:`ahead` of another canvas (R, S) and what is ``undecided`` (R, S) in it."""
        ahead = canvas.masked_fill(undecided, UNDECIDED)
        return ahead.masked_fill(self.rows.is_inert, NOTHING) if self.rows.has_padding else ahead

    @cached_property
    def strategy_rows(self) -> list[tuple[Strategy, Tensor | None]]:
        """The strategies in use, each with the rows that use it; None where all rows do."""
        strategies, used = self.table.strategies, np.unique(self._strategy).tolist()
        if len(used) == 1:
            return [(strategies[used[0]], None)]
        return [(strategies[i], self.on_device(np.flatnonzero(self._strategy == i))) for i in used]

    @cached_property
    def times(self) -> Tensor:
        """The time (R,) of each block's next pass, as its strategy has it."""
        time = self.masked.sum(1) / self.rows.lengths.clamp(min=1)
        for strategy, rows in self.strategy_rows:
            if rows is None:
                time = strategy.time(time, self.step, self.options)
            else:
                time[rows] = strategy.time(time[rows], self.step[rows], self.options.rows(rows))
        return time
