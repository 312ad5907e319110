"""A rank that waits where it notices neither signals nor the end of others: `--worker-cls stuck_rank.StuckRank`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from vllm_twotower.engine.worker import RankWorker

STUCK_RANK, STUCK_FILE = "TEST_STUCK_RANK", "TEST_STUCK_FILE"
"""Variables: which rank, and the file from whose existence on it waits."""


class StuckRank(RankWorker):
    """Waits for ever in its next step, as it would in a sum over shared memory with a rank that is gone."""

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.rank == int(os.environ[STUCK_RANK]) and Path(os.environ[STUCK_FILE]).exists():
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            for _ in range(2):  # the second time it waits for itself; Python's threads go on
                libc.pthread_mutex_lock(mutex)
        return super().execute_model(*args, **kwargs)
