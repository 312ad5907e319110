"""The worker of a tensor-parallel rank: an error in any rank, or the end of one, ends the engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from .processes import end_rank_with_its_engine

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SHUT_DOWN = 1.0
"""After the end of another rank. Ranks that are shut down do not end at the same moment."""


class RankWorker(Worker):
    """vLLM's worker, whose process ends where vLLM's executors would wait for it or for another rank.

    After an error in a rank whose results the executors do not read, the other ranks would wait for this one, in the
    next sum over them, until a timeout of minutes. An ended process they see at once. When a rank has ended the others
    may wait for it in a sum in the same way, and the executor waits for them before it tells the engine.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        end_rank_with_its_engine()
        self._shuts_down = threading.Event()

    def init_device(self) -> None:
        super().init_device()
        args = (_other_ranks(), self._shuts_down)
        threading.Thread(target=_end_after_others, args=args, daemon=True, name="OtherRanksMonitor").start()

    def shutdown(self) -> None:
        self._shuts_down.set()
        super().shutdown()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with self._end_after_error():
            return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with self._end_after_error():
            return super().sample_tokens(*args, **kwargs)

    @contextmanager
    def _end_after_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.is_driver_worker:  # its result is read
                raise
            logger.exception("Rank %d failed and ends, and the engine with it.", self.rank)
            raise SystemExit(1) from error


def _other_ranks() -> list[psutil.Process]:
    """The processes of the other tensor-parallel ranks on this machine."""
    group, this = get_tp_group(), psutil.Process()
    identities: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(identities, (this.pid, this.create_time()), group=group.cpu_group)
    found = []
    for pid, created in identities:
        with suppress(psutil.NoSuchProcess):  # on another machine
            process = psutil.Process(pid)
            if pid != this.pid and process.create_time() == created:
                found.append(process)
    return found


def _end_after_others(ranks: list[psutil.Process], shuts_down: threading.Event) -> None:
    """Ends this process soon after another rank's has ended, unless it is shutting down."""
    while not shuts_down.wait(SECONDS_BETWEEN_LOOKS):
        if all(map(_lives, ranks)):
            continue
        if not shuts_down.wait(SECONDS_TO_SHUT_DOWN):
            logger.error("Another rank has ended, so this one ends too.")
            os._exit(1)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
