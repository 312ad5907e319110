"""The inputs of a pass on the device, at addresses that stay the same; what a pass needs is sent in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from vllm.utils.platform_utils import is_pin_memory_available

from vllm_twotower.model.denoiser import CanvasRows

from .tower_rows import TowerRows

_FIELDS = ("batch_rows", "slots", "starts", "lengths", "query_start_loc")


class DeviceRows:
    """A tower's rows on the device, int64: ``batch_rows``, ``slots``, ``starts``, ``lengths`` (n,), and
    ``query_start_loc`` (n + 1,); views of the buffers.

    ``host`` are the same rows on the host, and ``host_slots`` (n,) their requests' places in the request table.
    """

    def __init__(self, host: TowerRows, host_slots: np.ndarray, buffer: Tensor):
        self.host, self.host_slots = host, host_slots
        num_rows = len(host)
        self.batch_rows, self.slots, self.starts, self.lengths = buffer[:4, :num_rows]
        self.query_start_loc = buffer[4, : num_rows + 1]

    def __len__(self) -> int:
        return len(self.host)

    @cached_property
    def row(self) -> Tensor:
        """(T,): the row each token belongs to."""
        rows = torch.arange(len(self), device=self.slots.device)
        if self.host.num_tokens == len(self):
            return rows
        return torch.repeat_interleave(rows, self.lengths, output_size=self.host.num_tokens)

    @cached_property
    def positions(self) -> Tensor:
        """(T,): each token's position in its sequence."""
        tokens = torch.arange(self.host.num_tokens, device=self.slots.device)
        return tokens + (self.starts - self.query_start_loc[:-1])[self.row]

    def canvas_rows(self, state_indices: Mapping[str, Tensor]) -> CanvasRows:
        """How the denoiser's tokens lie in the rows; ``state_indices`` as in :class:`CanvasRows`."""
        width, lengths = int(self.host.lengths.max()), self.lengths[:, None]
        token_of_position = position_of_token = None
        if (self.host.lengths != width).any():
            column = torch.arange(width, device=lengths.device)
            token_of_position = (self.query_start_loc[:-1, None] + torch.minimum(column, lengths - 1)).flatten()
            offset = torch.arange(self.host.num_tokens, device=lengths.device) - self.query_start_loc[:-1][self.row]
            position_of_token = self.row * width + offset
        return CanvasRows(len(self), width, self.row, token_of_position, position_of_token, state_indices)


class PassBuffers:
    """Buffers (2, 5, max_num_reqs + 1) int64 for the rows of both towers; on a CPU there is one memory only."""

    def __init__(self, max_num_reqs: int, device: torch.device):
        shape = (2, len(_FIELDS), max_num_reqs + 1)
        on_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=not on_cpu and is_pin_memory_available())
        self._array = self._host.numpy()
        self._device = self._host if on_cpu else torch.zeros(shape, dtype=torch.int64, device=device)

    def send(self, slots: np.ndarray, context: TowerRows, denoiser: TowerRows) -> list[DeviceRows]:
        """Sends the rows of both towers; ``slots`` are those of vLLM's batch.

        What was sent before must have been read.
        """
        sent = []
        for rows, array, buffer in zip((context, denoiser), self._array, self._device, strict=True):
            num_rows, of_rows = len(rows), slots[rows.batch_rows]
            array[:4, :num_rows] = rows.batch_rows, of_rows, rows.starts, rows.lengths
            array[4, : num_rows + 1] = rows.query_start_loc
            sent.append(DeviceRows(rows, of_rows, buffer))
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return sent
