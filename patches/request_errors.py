"""The reason for which a request ended with an error, in its answer (upstream: vllm/v1/engine/output_processor.py)."""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any


def with_reasons(upstream_process: Callable) -> Callable:
    """Answer a request of a server that the TwoTower scheduler ended with an error in the scheduler's words."""

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

    return process_outputs
