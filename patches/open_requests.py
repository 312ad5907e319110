"""Answers for the requests of an engine that is shut down (upstream: vllm/v1/engine/async_llm.py, core_client.py)."""

import queue
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import followed_by, serves_two_tower


def ending_open_requests(upstream_shutdown: Callable) -> Callable:
    """``AsyncLLM.shutdown``, after which no open request waits any longer."""
    return _answering(upstream_shutdown, end_open_requests)


def ending_waiting(upstream_shutdown: Callable) -> Callable:
    """``MPClient.shutdown``, after which nobody waits for output any longer."""
    return _answering(upstream_shutdown, end_waiting)


def _answering(upstream_shutdown: Callable, answer: Callable[[Any, Exception], None]) -> Callable:
    """Have ``answer`` called for a TwoTower model, with its client and a dead engine's error, after the shutdown.

    An engine may be shut down as late as when Python ends, where nothing can be imported.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    def answer_open_requests(client: Any) -> None:
        config = getattr(client, "vllm_config", None)  # None if it failed to start
        if config is not None and serves_two_tower(config.model_config):
            answer(client, EngineDeadError())

    return followed_by(upstream_shutdown, answer_open_requests)


def end_open_requests(engine: Any, error: Exception) -> None:
    """Give every open request of an AsyncLLM the error, in the event loop that serves them."""
    handler = getattr(engine, "output_handler", None)
    if handler is not None and not (loop := handler.get_loop()).is_closed():
        loop.call_soon_threadsafe(engine.output_processor.propagate_error, error)


def end_waiting(client: Any, error: Exception) -> None:
    """Wake whoever waits for the output of a SyncMPClient, as that of an AsyncMPClient is woken by vLLM."""
    outputs = getattr(client, "outputs_queue", None)
    if isinstance(outputs, queue.Queue):
        outputs.put_nowait(error)
