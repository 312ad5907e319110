"""Workers of tensor-parallel ranks, an error in any of which ends the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)


class _EndsAfterErrors:
    """Ends the process after an error in a rank whose results vLLM's executors do not read.

    They would not notice: the other ranks would wait for this one, in the next sum over them, until a timeout of
    minutes. An ended process they see at once.
    """

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


class RankOnCPU(_EndsAfterErrors, CPUWorker):
    """vLLM's CPU worker as a tensor-parallel rank."""


class RankOnGPU(_EndsAfterErrors, Worker):
    """vLLM's GPU worker as a tensor-parallel rank."""
