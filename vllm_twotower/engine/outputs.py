"""The output of a traced request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.outputs import CompletionOutput

from vllm_twotower.trace import DiffusionTrace

from .traces import add_block


class RequestTrace:
    """A request's trace, of what the engine has sent so far; put together when it is looked at."""

    def __init__(self) -> None:
        self._trace, self._sent = DiffusionTrace(), list[Sequence[int]]()

    def add(self, numbers: Sequence[int]) -> None:
        """Adds what a step has returned, see :func:`~.traces.add_block`."""
        self._sent.append(numbers)

    def whole(self) -> DiffusionTrace:
        """All of it."""
        for numbers in self._sent:
            add_block(self._trace, numbers)
        self._sent.clear()
        return self._trace


@dataclass(repr=False)
class TracedCompletionOutput(CompletionOutput):
    """vLLM's output with the trace of its tokens.

    vLLM puts outputs of a stream together that wait for their reader; the trace follows the tokens.
    """

    _of_request: RequestTrace = field(default_factory=RequestTrace)
    _start: int = 0

    @classmethod
    def of(cls, output: CompletionOutput, of_request: RequestTrace, start: int) -> TracedCompletionOutput:
        """The output, whose first token is number ``start`` of the request's."""
        traced = cls.__new__(cls)
        traced.__dict__.update(vars(output), _of_request=of_request, _start=start)
        return traced

    @property
    def diffusion_trace(self) -> DiffusionTrace:
        """What was decided of the output's tokens, when, and how surely."""
        return self._of_request.whole().part(self._start, self._start + len(self.token_ids))
