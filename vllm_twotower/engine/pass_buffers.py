"""The inputs of a pass on the device, at addresses that stay the same; what a pass needs is sent in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.utils.platform_utils import is_pin_memory_available

from .tower_rows import DeviceRows, TowerRows

RUNS = ("context", "drafts", "canvases")
_FIELDS = ("batch_rows", "slots", "starts", "lengths")


class PassBuffers:
    """Buffers (3, 4, max_num_reqs) int64 for the rows of a pass; on a CPU there is one memory only.

    Rows that fill up a bucket have the slot ``no_request``, and no tokens.
    """

    def __init__(self, max_num_reqs: int, no_request: int, device: torch.device):
        shape, self._no_request = (len(RUNS), len(_FIELDS), max_num_reqs), no_request
        on_cpu = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=not on_cpu and is_pin_memory_available())
        self._array = self._host.numpy()
        self._device = self._host if on_cpu else torch.zeros(shape, dtype=torch.int64, device=device)
        self._is_sent = None if on_cpu else torch.Event(device)

    def send(
        self,
        slots: np.ndarray,
        context: TowerRows,
        drafts: TowerRows,
        canvases: TowerRows,
        buckets: Sequence[tuple[int, int] | None] = (None, None, None),
    ) -> tuple[DeviceRows, DeviceRows, DeviceRows]:
        """Sends the rows of a pass; ``slots`` are those of vLLM's batch.

        Drafts and canvases have the width of the longest. The buckets are for passes that are replayed: so many rows on
        the device, of so many tokens each; what is left of them is inert.
        """
        if self._is_sent is not None:
            self._is_sent.synchronize()
        runs = zip((context, drafts, canvases), buckets, strict=True)
        of_context, of_drafts, of_canvases = (self._put(i, slots, *run, is_padded=i > 0) for i, run in enumerate(runs))
        self._copy()
        return of_context, of_drafts, of_canvases

    def clear(self) -> None:
        """Sends rows of no request."""
        self._array[:] = np.array((0, self._no_request, 0, 0))[:, None]
        self._copy()

    def rows(self, run: str, num_rows: int, width: int, max_model_len: int) -> DeviceRows:
        """The first rows of a run's buffers, whatever is in them; to the host they are as long as requests can be."""
        whole = np.full(num_rows, width)
        host = TowerRows(np.zeros_like(whole), max_model_len - whole, whole)
        no_requests, sent = np.full(num_rows, self._no_request), self._sent(RUNS.index(run), num_rows)
        return DeviceRows(host, no_requests, *sent, width, has_padding=True)

    def _sent(self, run: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of a run's first rows, (num_rows,) each."""
        batch_rows, slots, starts, lengths = self._device[run, :, :num_rows]
        return batch_rows, slots, starts, lengths

    def _copy(self) -> None:
        if self._is_sent is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._is_sent.record()

    def _put(
        self, run: int, slots: np.ndarray, rows: TowerRows, bucket: tuple[int, int] | None, is_padded: bool
    ) -> DeviceRows:
        """The rows of one run, which arrive with the next copy; ``is_padded`` gives all the width of the longest."""
        count, of_rows, array = len(rows), slots[rows.batch_rows], self._array[run]
        if count:
            array[:, :count] = rows.batch_rows, of_rows, rows.starts, rows.lengths
        array[:, count:] = np.array((0, self._no_request, 0, 0))[:, None]
        longest = int(rows.lengths.max(initial=0))
        is_even = bool((rows.lengths == longest).all())
        num_rows, width = bucket or (count, longest if is_padded or is_even else None)
        has_padding = bucket is not None or (width is not None and not is_even)
        return DeviceRows(rows, of_rows, *self._sent(run, num_rows), width, has_padding)
