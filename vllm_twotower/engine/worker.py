"""The worker of a tensor-parallel rank, an error in any of which ends the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)


class RankWorker(Worker):
    """vLLM's worker; ends its process after an error in a rank whose results vLLM's executors do not read.

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
