"""Traces in responses (upstream: vllm/entrypoints/openai/completion/serving.py and chat_completion/serving.py)."""

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower
from vllm_twotower.trace import TRACE, DiffusionTrace


def in_completion(upstream_make: Callable) -> Callable:
    """Give each choice of a completion the trace of its tokens."""

    @functools.wraps(upstream_make)
    def request_output_to_completion_response(self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any):
        response = upstream_make(self, final_res_batch, request, *args, **kwargs)
        if asks_for_trace(self, request):
            outputs = [output for result in final_res_batch for output in result.outputs]
            for choice, output in zip(response.choices, outputs, strict=True):
                setattr(choice, TRACE, trace_of(output).to_json())
        return response

    return request_output_to_completion_response


def in_chat(upstream_generate: Callable) -> Callable:
    """Give each choice of a chat's response the trace of its tokens."""

    @functools.wraps(upstream_generate)
    async def chat_completion_full_generator(self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any):
        if not asks_for_trace(self, request):
            return await upstream_generate(self, request, result_generator, *args, **kwargs)
        traces = StreamedTraces(request)
        results = traces.noted(result_generator)
        response = await upstream_generate(self, request, results, *args, **kwargs)
        for choice in getattr(response, "choices", ()):  # an error has none
            setattr(choice, TRACE, traces.take(choice.index))
        return response

    return chat_completion_full_generator


def in_stream(upstream_generate: Callable) -> Callable:
    """Give each chunk of a streamed response the trace of the tokens that came since the last one."""
    signature = inspect.signature(upstream_generate)

    @functools.wraps(upstream_generate)
    def stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        arguments = signature.bind(*args, **kwargs).arguments
        request = arguments["request"]
        if not asks_for_trace(arguments["self"], request):
            return upstream_generate(*args, **kwargs)
        traces = StreamedTraces(request)
        arguments["result_generator"] = traces.noted(arguments["result_generator"])
        return traces.put_into(upstream_generate(**arguments))

    return stream_generator


def asks_for_trace(serving: Any, request: Any) -> bool:
    """Whether a request of a TwoTower server asks for a trace."""
    return serves_two_tower(serving.model_config) and (request.vllm_xargs or {}).get(TRACE, "none") != "none"


def trace_of(output: Any) -> DiffusionTrace:
    """The trace of a completion's output; an empty one before there are any tokens."""
    return getattr(output, TRACE, None) or DiffusionTrace()


class StreamedTraces:
    """The traces of a response's choices that no chunk had yet."""

    def __init__(self, request: Any):
        self._num_choices = request.n or 1
        self._traces: dict[int, DiffusionTrace] = {}

    async def noted(self, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The engine's results as they come; those of a completion with the number of their prompt."""
        async for result in results:
            prompt, output_of_request = result if isinstance(result, tuple) else (0, result)
            for output in output_of_request.outputs:
                index = output.index + prompt * self._num_choices
                self._traces.setdefault(index, DiffusionTrace()).extend(trace_of(output))
            yield result

    def take(self, index: int) -> dict[str, Any]:
        """What a choice has, which is then gone."""
        return self._traces.pop(index, DiffusionTrace()).to_json()

    async def put_into(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """The chunks ``data: {...}`` with traces; those without a choice's tokens are left alone."""
        async for chunk in chunks:
            data = chunk.removeprefix("data: ")
            if self._traces and data.startswith("{"):
                response = json.loads(data)
                for choice in response.get("choices", ()):
                    if "role" not in choice.get("delta", ()):  # a chat begins with a chunk without tokens
                        choice[TRACE] = self.take(choice["index"])
                chunk = f"data: {json.dumps(response, ensure_ascii=False, separators=(',', ':'))}\n\n"
            yield chunk
