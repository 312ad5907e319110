"""The rows that one tower runs in a pass: planned on the host, and as they lie on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID


@dataclass
class TowerRows:
    """Rows of one tower, still on the host: for row i, ``lengths[i]`` tokens from position ``starts[i]`` on.

    ``batch_rows`` (n,) are the rows of vLLM's batch they belong to.
    """

    batch_rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.batch_rows)

    def take(self, index: np.ndarray) -> TowerRows:
        """Some of the rows, or all in another order."""
        return TowerRows(self.batch_rows[index], self.starts[index], self.lengths[index])

    def widened(self, width: int) -> TowerRows:
        """The rows with so many tokens each."""
        return TowerRows(self.batch_rows, self.starts, np.full_like(self.lengths, width))

    @cached_property
    def query_start_loc(self) -> np.ndarray:
        """(n + 1,): where each row's tokens begin."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def ends(self) -> np.ndarray:
        """(n,): the position behind each row's last token."""
        return self.starts + self.lengths


@dataclass
class DeviceRows:
    """n rows on the device, int64: ``batch_rows``, their requests' ``slots``, ``starts`` and ``lengths`` (n,) each.

    Every row has ``width`` tokens; without a width they have as many as they are long, one row after the other.
    If it ``has_padding`` a row may be shorter than the width: its last tokens are inert, they are written nowhere and
    attended to by none. Rows without any tokens fill up a bucket: ``host`` and ``host_slots`` are those before them.
    """

    host: TowerRows
    host_slots: np.ndarray
    batch_rows: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    width: int | None
    has_padding: bool

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return self.host.num_tokens if self.width is None else len(self) * self.width

    @property
    def even_width(self) -> int:
        """The ``width`` of rows that have one."""
        assert self.width is not None
        return self.width

    def on_device(self, values: np.ndarray) -> Tensor:
        """The values on the rows' device."""
        return async_tensor_h2d(values, device=self.slots.device)

    def text_slots(self, text: Tensor) -> Tensor:
        """The slots (n,) of the rows' texts (max_num_reqs, ...); of rows of no request some slot."""
        return self.slots.clamp(max=len(text) - 1) if self.has_padding else self.slots

    def take(self, index: np.ndarray) -> DeviceRows:
        """Some of the rows."""
        of_index = self.on_device(index)
        batch_rows, slots, starts, lengths = (
            tensor[of_index] for tensor in (self.batch_rows, self.slots, self.starts, self.lengths)
        )
        host, host_slots = self.host.take(index), self.host_slots[index]
        return DeviceRows(host, host_slots, batch_rows, slots, starts, lengths, self.width, self.has_padding)

    def next_positions(self) -> DeviceRows:
        """Rows of one token each, the one behind each row's last."""
        host = TowerRows(self.host.batch_rows, self.host.ends, np.ones_like(self.host.lengths))
        ends = self.starts + self.lengths
        return DeviceRows(host, self.host_slots, self.batch_rows, self.slots, ends, self.lengths, 1, self.has_padding)

    def behind_each_token(self) -> DeviceRows:
        """Rows of one token each, those behind each of the T tokens of rows with a width."""
        host, count, width = self.host, len(self.host), self.even_width
        within = np.minimum(np.tile(np.arange(1, width + 1), count), host.lengths.repeat(width))
        starts = host.starts.repeat(width) + within
        of_host = TowerRows(host.batch_rows.repeat(width), starts, np.ones_like(starts))
        batch_rows, slots, lengths = (values[self.row] for values in (self.batch_rows, self.slots, self.lengths))
        host_slots = self.host_slots.repeat(width)
        return DeviceRows(of_host, host_slots, batch_rows, slots, self.positions + 1, lengths, 1, self.has_padding)

    @property
    def query_start_loc(self) -> Tensor:
        """(n + 1,) int32: where each row's tokens begin."""
        if self.width is None:
            return self.on_device(self.host.query_start_loc.astype(np.int32))
        return torch.arange(len(self) + 1, dtype=torch.int32, device=self.slots.device) * self.width

    @cached_property
    def row(self) -> Tensor:
        """(T,): the row each token belongs to."""
        rows = torch.arange(len(self), device=self.slots.device)
        if self.width == 1:
            return rows
        counts = self.lengths if self.width is None else self.width
        return torch.repeat_interleave(rows, counts, output_size=self.num_tokens)

    @cached_property
    def _columns(self) -> Tensor:
        """(width,): the places in a row."""
        return torch.arange(self.even_width, device=self.slots.device)

    @cached_property
    def positions(self) -> Tensor:
        """(T,): each token's position in its sequence; of an inert one some position of its row."""
        if self.width is None:
            tokens = torch.arange(self.num_tokens, device=self.slots.device)
            return tokens + (self.starts - (self.lengths.cumsum(0) - self.lengths))[self.row]
        if self.width == 1:
            return self.starts
        columns = self._columns
        if self.has_padding:
            columns = torch.minimum(columns, (self.lengths[:, None] - 1).clamp(min=0))
        return (self.starts[:, None] + columns).flatten()

    @property
    def is_inert(self) -> Tensor:
        """(n, width) bool: the tokens behind each row's length."""
        return self._columns >= self.lengths[:, None]

    def block_tables(self, of_batch: list[Tensor]) -> list[Tensor]:
        """The rows' block tables, of each KV cache group, out of those of vLLM's batch."""
        tables = [table[self.batch_rows] for table in of_batch]
        if self.has_padding:
            is_empty = self.lengths[:, None] == 0
            tables = [table.masked_fill(is_empty, NULL_BLOCK_ID) for table in tables]
        return tables

    def slot_mapping(self, block_table: Tensor, block_size: int) -> Tensor:
        """(T,): where each token's keys and values go in the pages of ``block_table`` (n, columns)."""
        pages = block_table[self.row, self.positions // block_size].long()
        slots = pages * block_size + self.positions % block_size
        return slots.masked_fill(self.is_inert.flatten(), PAD_SLOT_ID) if self.has_padding else slots
