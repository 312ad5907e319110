"""The inputs of a pass on the device, at addresses that stay the same; what a pass needs is sent in one copy."""

from __future__ import annotations

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available

from .tower_rows import DeviceRows, TowerRows

_FIELDS = ("batch_rows", "slots", "starts", "lengths")


class PassBuffers:
    """Buffers (2, 4, max_num_reqs) int64 for the rows of both towers; on a CPU there is one memory only."""

    def __init__(self, max_num_reqs: int, device: torch.device):
        shape = (2, len(_FIELDS), max_num_reqs)
        on_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=not on_cpu and is_pin_memory_available())
        self._array = self._host.numpy()
        self._device = self._host if on_cpu else torch.zeros(shape, dtype=torch.int64, device=device)

    def send(
        self,
        slots: np.ndarray,
        context: TowerRows,
        denoiser: TowerRows,
        bucket: int | None = None,
    ) -> tuple[DeviceRows, DeviceRows]:
        """Sends the rows of both towers; ``slots`` are those of vLLM's batch.

        Canvases have the width of the longest. What was sent before must have been read. A ``bucket`` is the number of
        rows on the device, filled up with rows that have no tokens, for passes that are replayed.
        """
        sent = []
        for rows, array, buffer in zip((context, denoiser), self._array, self._device, strict=True):
            count, of_rows = len(rows), slots[rows.batch_rows]
            array[:, :count] = rows.batch_rows, of_rows, rows.starts, rows.lengths
            array[:, count:] = 0
            width = rows.common_length if count else 0
            has_padding = bucket is not None or (width is None and rows is denoiser)
            if rows is denoiser and width is None:
                width = int(rows.lengths.max())
            sent.append(DeviceRows(rows, of_rows, *buffer[:, : bucket or count], width, has_padding))
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return sent[0], sent[1]
