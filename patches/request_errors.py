"""The reason for which a request ended with an error, in its answer (upstream: vllm/v1/engine/output_processor.py)."""

import functools
from http import HTTPStatus
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace

PROCESS = "vllm.v1.engine.output_processor:OutputProcessor.process_outputs"


def install_process() -> None:
    """Answer a request of a server that the TwoTower scheduler ended with an error in the scheduler's words."""
    holder, name = locate(PROCESS)
    upstream_process = getattr(holder, name)

    @functools.wraps(upstream_process)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine import FinishReason

        # Only our scheduler gives a reason for an error.
        failed = [out for out in engine_core_outputs if out.finish_reason == FinishReason.ERROR and out.stop_reason]
        states = [(self.request_states.get(out.request_id), out.stop_reason) for out in failed]
        result = upstream_process(self, engine_core_outputs, *args, **kwargs)
        for state, reason in states:
            if state is not None and state.queue is not None:
                from vllm.exceptions import GracefulHTTPError

                message = f"The request ended with an error: {reason}."
                state.queue.put(GracefulHTTPError(message, HTTPStatus.INTERNAL_SERVER_ERROR))
        return result

    replace(PROCESS, process_outputs)


PATCHES = (
    Patch(
        name="request-errors",
        target=PROCESS,
        what="OutputProcessor.process_outputs gives a request that ended with an error and a reason an exception that "
        "says the reason.",
        why="vLLM's server says 'Internal server error', whatever the reason.",
        upstream="not reported",
        remove_when="vLLM's server answers a request that a scheduler ends with an error with the scheduler's reason",
        applies_when=everywhere,
        sources=(
            PROCESS,
            "vllm.v1.engine.output_processor:RequestOutputCollector",
            "vllm.v1.engine.async_llm:AsyncLLM.generate",
            "vllm.exceptions:GracefulHTTPError",
        ),
        source_sha256={"0.32.0": "c6f795c223812cb0d937b301e83777ad50792b214cc4f25299b73ff5de93abae"},
        install=install_process,
    ),
)
