"""Traces on their way to a request's outputs (upstream: vllm/v1/engine/output_processor.py)."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_twotower.trace import TRACE


def keeping_traces(upstream_process: Callable) -> Callable:
    """Take the traces of requests out of the engine's outputs, and keep them with the requests."""

    @functools.wraps(upstream_process)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            # No TwoTower engine has a KV connector, and others know no traces.
            if output.kv_transfer_params is not None and TRACE in output.kv_transfer_params:
                from vllm_twotower.engine.outputs import RequestTrace

                numbers = output.kv_transfer_params.pop(TRACE)
                output.kv_transfer_params = None
                if (state := self.request_states.get(output.request_id)) is not None:
                    held = vars(state)
                    if TRACE not in held:
                        held[TRACE] = RequestTrace()
                    held[TRACE].add(numbers)
        return upstream_process(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def with_trace(upstream_make: Callable) -> Callable:
    """Give a completion the trace of its tokens, if its request has one."""

    @functools.wraps(upstream_make)
    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = upstream_make(self, *args, **kwargs)
        trace = vars(self).get(TRACE)
        if trace is None:
            return output
        from vllm_twotower.engine.outputs import TracedCompletionOutput

        return TracedCompletionOutput.of(output, trace, self.detokenizer.num_output_tokens() - len(output.token_ids))

    return new_completion_output
