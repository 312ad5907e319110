"""Host arrays of a step, brought to the device together."""

from __future__ import annotations

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available


class Staging:
    """Collects int64 arrays on the host and copies them to the device at once.

    :meth:`put` returns the tensor before its content has arrived; it is there after the next :meth:`send`. Tensors are
    valid until :meth:`begin`, which reuses their memory. On a CPU there is one memory only, and nothing is copied.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 14):
        self._device = device
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        on_cpu = self._device.type == "cpu"
        host = torch.empty(capacity, dtype=torch.int64, pin_memory=not on_cpu and is_pin_memory_available())
        self._host, self._array = host, host.numpy()
        self._on_device = host if on_cpu else torch.empty(capacity, dtype=torch.int64, device=self._device)
        self._used = self._sent = 0

    def begin(self) -> None:
        """Forgets all arrays; what was put before must have been read."""
        self._used = self._sent = 0

    def put(self, values: np.ndarray) -> torch.Tensor:
        """The values (n,) as an int64 tensor on the device."""
        start, end = self._used, self._used + len(values)
        if end > len(self._array):  # tensors handed out keep the old memory alive
            self.send()
            self._allocate(max(2 * len(self._array), len(values)))
            start, end = 0, len(values)
        self._array[start:end] = values
        self._used = end
        return self._on_device[start:end]

    def send(self) -> None:
        """Copies what was put since the last time."""
        if self._on_device is not self._host and self._sent < self._used:
            part = slice(self._sent, self._used)
            self._on_device[part].copy_(self._host[part], non_blocking=True)
        self._sent = self._used
