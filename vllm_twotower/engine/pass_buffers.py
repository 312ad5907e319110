"""The inputs of a pass on the device, at addresses that stay the same; what a pass needs is sent in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available

from .tower_rows import DeviceRows, TowerRows

_FIELDS = ("batch_rows", "slots", "starts", "lengths")


class PassBuffers:
    """Buffers (3, 4, max_num_reqs) int64 for the rows of a pass; on a CPU there is one memory only."""

    def __init__(self, max_num_reqs: int, device: torch.device):
        shape = (3, len(_FIELDS), max_num_reqs)
        on_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=not on_cpu and is_pin_memory_available())
        self._array = self._host.numpy()
        self._device = self._host if on_cpu else torch.zeros(shape, dtype=torch.int64, device=device)

    def send(
        self,
        slots: np.ndarray,
        context: TowerRows,
        drafts: TowerRows,
        canvases: TowerRows,
        buckets: Sequence[tuple[int, int] | None] = (None, None, None),
    ) -> list[DeviceRows]:
        """Sends the rows of a pass; ``slots`` are those of vLLM's batch.

        Drafts and canvases have the width of the longest. What was sent before must have been read. The buckets are for
        passes that are replayed: so many rows on the device, of so many tokens each; what is left of them is inert.
        """
        runs = zip((context, drafts, canvases), buckets, strict=True)
        sent = [self._put(i, slots, *run, is_padded=i > 0) for i, run in enumerate(runs)]
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return sent

    def _put(
        self, run: int, slots: np.ndarray, rows: TowerRows, bucket: tuple[int, int] | None, is_padded: bool
    ) -> DeviceRows:
        """The rows of one run, which arrive with the next copy; ``is_padded`` gives all the width of the longest."""
        count, of_rows, array = len(rows), slots[rows.batch_rows], self._array[run]
        if count:
            array[:, :count] = rows.batch_rows, of_rows, rows.starts, rows.lengths
        array[:, count:] = 0
        longest = int(rows.lengths.max(initial=0))
        is_even = bool((rows.lengths == longest).all())
        num_rows, width = bucket or (count, longest if is_padded or is_even else None)
        has_padding = bucket is not None or (width is not None and not is_even)
        return DeviceRows(rows, of_rows, *self._device[run, :, :num_rows], width, has_padding)
