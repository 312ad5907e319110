"""The canvases that are denoised in a step, from the request table and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twotower.sampling.strategies import Strategy

from .request_table import RequestTable
from .staging import Staging
from .tower_rows import TowerRows


class Blocks:
    """R canvases of a step, of S positions where the canvas length is S, with T tokens in all.

    On the host: ``rows`` and ``host_slots`` (R,). On the device: ``slots`` (R,), ``starts`` (R,), the canvas's first
    position, ``lengths`` (R,); and what changes from pass to pass, ``canvas`` (R, S), ``masked`` (R, S), the positions
    still to fill, and ``step`` (R,), the passes a block has had. ``places`` (T,) is where each token lies in the R
    canvases, flattened; None where all have S positions, so that tokens and positions are one.
    """

    def __init__(self, rows: TowerRows, host_slots: np.ndarray, table: RequestTable, staging: Staging):
        self.rows, self.host_slots = rows, host_slots
        self._canvas_length = table.engine.canvas_length
        ragged = (rows.lengths != self._canvas_length).any()
        self.slots, self.starts, self.lengths = (staging.put(x) for x in (host_slots, rows.starts, rows.lengths))
        self.places = staging.put(rows.spread(np.arange(len(rows)) * self._canvas_length)) if ragged else None
        staging.send()
        self._strategy = table.strategy[host_slots]
        self.options = table.options.rows(self.slots)
        self.load(table)

    def load(self, table: RequestTable) -> None:
        """Takes the canvases from the table."""
        self.set(table.canvas[self.slots], table.step[self.slots], table.engine.mask_token_id)

    def store(self, table: RequestTable) -> None:
        """Puts the canvases into the table."""
        table.canvas[self.slots], table.step[self.slots] = self.canvas, self.step

    def set(self, canvas: Tensor, step: Tensor, mask_token_id: int) -> None:
        """Puts the canvases (R, S) and their steps (R,)."""
        self.canvas, self.step = canvas, step
        self.masked = canvas == mask_token_id
        if self.places is not None:
            self.masked &= torch.arange(self._canvas_length, device=canvas.device) < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def input_ids(self) -> Tensor:
        """(T,): the tokens of the canvases."""
        return self.by_token(self.canvas)

    @cached_property
    def row_of_token(self) -> Tensor:
        """(T,) int64."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.slots.device), self.lengths, output_size=self.rows.num_tokens
        )

    @cached_property
    def column(self) -> Tensor:
        """(T,) int64: where each token lies in its row."""
        columns = torch.arange(self._canvas_length, device=self.slots.device)
        return columns.repeat(len(self)) if self.places is None else self.places % self._canvas_length

    def by_token(self, values: Tensor) -> Tensor:
        """(R, S) -> (T,)."""
        return values.flatten() if self.places is None else values.flatten()[self.places]

    def by_row(self, values: Tensor) -> Tensor:
        """(T,) -> (R, S), zero where a row is shorter."""
        if self.places is not None:
            empty = values.new_zeros(len(self) * self._canvas_length)
            values = empty.index_copy_(0, self.places, values)
        return values.view(len(self), self._canvas_length)

    @cached_property
    def strategy_rows(self) -> list[tuple[int, Tensor | None]]:
        """The strategies in use, each with the rows that use it; None where all rows do."""
        first = int(self._strategy[0])
        if (self._strategy == first).all():
            return [(first, None)]
        used = np.unique(self._strategy).tolist()
        rows = [np.flatnonzero(self._strategy == index) for index in used]
        return [(i, async_tensor_h2d(r, device=self.slots.device)) for i, r in zip(used, rows, strict=True)]

    def times(self, strategies: Sequence[Strategy]) -> Tensor:
        """The time (R,) of each block's next pass, as its strategy has it."""
        time = self.masked.sum(1) / self.lengths
        for index, rows in self.strategy_rows:
            of_strategy = strategies[index].time
            if rows is None:
                time = of_strategy(time, self.step, self.options)
            else:
                time[rows] = of_strategy(time[rows], self.step[rows], self.options.rows(rows))
        return time
