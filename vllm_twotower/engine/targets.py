"""The positions that a pass has logits for: the next one of a row, or those of its canvas."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import xgrammar
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twotower.sampling.prediction import suppress_mask_token
from vllm_twotower.sampling.strategies import Strategy

from .logit_rules import NOTHING, UNDECIDED
from .request_table import RequestTable
from .tower_rows import TowerRows


class Targets:
    """R rows of a pass with T positions in all, on the host: ``rows`` and ``host_slots`` (R,), their requests.

    On the device: ``slots`` (R,) and ``starts`` (R,), each row's first position.
    """

    canvas: Tensor | None = None
    """What stands at the positions (R, S), where a row has several."""
    step: Tensor | None = None
    """The passes (R,) each row's block has had, where random numbers depend on it."""
    never: int | None = None
    """The token that can stand nowhere."""

    def __init__(self, rows: TowerRows, host_slots: np.ndarray, slots: Tensor, starts: Tensor, table: RequestTable):
        self.rows, self.host_slots, self.slots, self.starts = rows, host_slots, slots, starts
        self.table = table
        self.options = table.options.rows(slots)

    def __len__(self) -> int:
        return len(self.rows)

    def on_device(self, values: np.ndarray) -> Tensor:
        """The values on the targets' device."""
        return async_tensor_h2d(values, device=self.slots.device)

    @cached_property
    def host_row(self) -> np.ndarray:
        """(T,): the row each position belongs to."""
        return np.repeat(np.arange(len(self)), self.rows.lengths)

    @cached_property
    def host_column(self) -> np.ndarray:
        """(T,): each position's place in its row."""
        return np.arange(self.rows.num_tokens) - self.rows.query_start_loc[:-1][self.host_row]

    @cached_property
    def row(self) -> Tensor:
        """``host_row`` on the device."""
        return self.on_device(self.host_row)

    @cached_property
    def column(self) -> Tensor:
        """``host_column`` on the device."""
        return self.on_device(self.host_column)

    def take(self, index: np.ndarray) -> Targets:
        """Some of the rows."""
        of_index = self.on_device(index)
        return type(self)(
            self.rows.take(index), self.host_slots[index], self.slots[of_index], self.starts[of_index], self.table
        )

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

    def by_row(self, values: Tensor) -> Tensor:
        """(T,) -> (R, S), zero where a row is shorter."""
        return values[:, None]

    def ahead(self) -> Tensor:
        """What stands in the rows from ``starts`` on (R, S), as :class:`~.logit_rules.RuledRows` has it."""
        return torch.full((len(self), 1), UNDECIDED, device=self.slots.device)


class NextTokens(Targets):
    """The position behind each row's text. On the host: ``num_returned`` (R,), the tokens that the step has for the
    row already, and ``bitmasks``, (V / 32,) int32 each, of the rows (R) that have a grammar."""

    num_returned: np.ndarray
    bitmasks: list[np.ndarray | None]

    def take(self, index: np.ndarray) -> NextTokens:
        taken = super().take(index)
        taken.num_returned, taken.bitmasks = self.num_returned[index], [self.bitmasks[i] for i in index]
        return taken

    @property
    def has_grammar(self) -> np.ndarray:
        return np.array([bitmask is not None for bitmask in self.bitmasks])

    @property
    def returned_column(self) -> np.ndarray:
        return self.num_returned

    def restrict(self, logits: Tensor) -> None:
        rows = np.flatnonzero(self.has_grammar)
        if len(rows):
            index = self.on_device(rows)
            of_rows = logits[index]
            bitmasks = self.on_device(np.stack([self.bitmasks[row] for row in rows]))
            xgrammar.apply_token_bitmask_inplace(of_rows, bitmasks)
            logits[index] = of_rows


class Canvases(Targets):
    """The canvases of blocks that the denoiser fills, of S positions where the canvas length is S.

    On the device: ``lengths`` (R,), and what changes from pass to pass, ``canvas`` (R, S), ``masked`` (R, S), the
    positions still to fill, and ``step`` (R,), the passes a block has had. ``places`` (T,) is where each token lies in
    the R canvases, flattened; None where all have S positions, so that tokens and positions are one.
    """

    def __init__(self, rows: TowerRows, host_slots: np.ndarray, slots: Tensor, starts: Tensor, table: RequestTable):
        super().__init__(rows, host_slots, slots, starts, table)
        self._canvas_length, self.never = table.engine.canvas_length, table.engine.mask_token_id
        self.places = None
        if (rows.lengths != self._canvas_length).any():
            self.places = self.on_device(self.host_row * self._canvas_length + self.host_column)
        self.lengths = self.on_device(rows.lengths)
        self._strategy = table.strategy[host_slots]
        self.load()

    def load(self) -> None:
        """Takes the canvases from the table."""
        self.set(self.table.canvas[self.slots], self.table.step[self.slots])

    def set(self, canvas: Tensor, step: Tensor) -> None:
        """Puts the canvases (R, S) and their steps (R,)."""
        self.canvas, self.step = canvas, step
        self.masked = canvas == self.never
        if self.places is not None:
            self.masked &= self._columns < self.lengths[:, None]

    def store(self, whole: Tensor) -> None:
        """Puts the canvases into the table; where they are ``whole`` (R,) empty ones for the next blocks."""
        self.table.canvas[self.slots] = self.canvas.masked_fill(whole[:, None], self.never)
        self.table.step[self.slots] = self.step.masked_fill(whole, 0)

    @property
    def _columns(self) -> Tensor:
        return torch.arange(self._canvas_length, device=self.slots.device)

    @property
    def input_ids(self) -> Tensor:
        """(T,): the tokens of the canvases."""
        return self.by_token(self.canvas)

    def by_token(self, values: Tensor) -> Tensor:
        """(R, S) -> (T,)."""
        return values.flatten() if self.places is None else values.flatten()[self.places]

    def by_row(self, values: Tensor) -> Tensor:
        if self.places is not None:
            empty = values.new_zeros(len(self) * self._canvas_length)
            values = empty.index_copy_(0, self.places, values)
        return values.view(len(self), self._canvas_length)

    def restrict(self, logits: Tensor) -> None:
        suppress_mask_token(logits, self.never)

    def ahead(self) -> Tensor:
        return self.ahead_of(self.canvas, self.masked)

    def ahead_of(self, canvas: Tensor, undecided: Tensor) -> Tensor:
        """:meth:`ahead` of another canvas (R, S) and what is ``undecided`` (R, S) in it."""
        ahead = canvas.masked_fill(undecided, UNDECIDED)
        return ahead if self.places is None else ahead.masked_fill(self._columns >= self.lengths[:, None], NOTHING)

    @cached_property
    def strategy_rows(self) -> list[tuple[Strategy, Tensor | None]]:
        """The strategies in use, each with the rows that use it; None where all rows do."""
        strategies, used = self.table.strategies, np.unique(self._strategy).tolist()
        if len(used) == 1:
            return [(strategies[used[0]], None)]
        return [(strategies[i], self.on_device(np.flatnonzero(self._strategy == i))) for i in used]

    def times(self) -> Tensor:
        """The time (R,) of each block's next pass, as its strategy has it."""
        time = self.masked.sum(1) / self.lengths
        for strategy, rows in self.strategy_rows:
            if rows is None:
                time = strategy.time(time, self.step, self.options)
            else:
                time[rows] = strategy.time(time[rows], self.step[rows], self.options.rows(rows))
        return time
