"""Answers for the requests of an engine that is shut down (upstream: vllm/v1/engine/async_llm.py, core_client.py)."""

import queue
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import Patch, call_after, everywhere, serves_two_tower

ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
CLIENT = "vllm.v1.engine.core_client"
ASYNC_SHUTDOWN, CLIENT_SHUTDOWN = f"{ASYNC}.shutdown", f"{CLIENT}:MPClient.shutdown"


def install_after(target: str, answer: Callable[[Any, Exception], None]) -> None:
    """Have ``answer`` called for a TwoTower model, with its client and a dead engine's error, after ``target``.

    An engine may be shut down as late as when Python ends, where nothing can be imported.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    def answer_open_requests(client: Any) -> None:
        config = getattr(client, "vllm_config", None)  # None if it failed to start
        if config is not None and serves_two_tower(config.model_config):
            answer(client, EngineDeadError())

    call_after(target, answer_open_requests)


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


_REMOVE_WHEN = "a vLLM engine that is shut down, or whose process is killed, ends the requests that are open"

PATCHES = (
    Patch(
        name="open-requests-of-a-server",
        target=ASYNC_SHUTDOWN,
        what="AsyncLLM.shutdown gives the requests that are still open the error of a dead engine.",
        why="It cancels the task that hands outputs and errors to them, often before it has handed on the error. Their "
        "clients then wait for an answer, and the server waits for their connections, without end.",
        upstream="not reported",
        remove_when=_REMOVE_WHEN,
        applies_when=everywhere,
        sources=(
            ASYNC_SHUTDOWN,
            f"{ASYNC}._run_output_handler",
            "vllm.v1.engine.output_processor:OutputProcessor.propagate_error",
        ),
        source_sha256={"0.32.0": "fcd3a8b03f1887ef38a68c396b23706996a106b1f739d63ac17fb38067bbf0cc"},
        install=lambda: install_after(ASYNC_SHUTDOWN, end_open_requests),
    ),
    Patch(
        name="open-requests-offline",
        target=CLIENT_SHUTDOWN,
        what="MPClient.shutdown wakes whoever waits for the output of the engine's process with an error.",
        why="If the process is killed, LLM.generate waits for its output without end.",
        upstream="not reported",
        remove_when=_REMOVE_WHEN,
        applies_when=everywhere,
        sources=(
            CLIENT_SHUTDOWN,
            f"{CLIENT}:MPClient.start_engine_core_monitor",
            f"{CLIENT}:BackgroundResources.__call__",
            f"{CLIENT}:SyncMPClient.__init__",
            f"{CLIENT}:SyncMPClient.get_output",
        ),
        source_sha256={"0.32.0": "18e273fc8958960b5ae717ec38154f3d0d9764aea13f1df92acf02e595c70306"},
        install=lambda: install_after(CLIENT_SHUTDOWN, end_waiting),
    ),
)
