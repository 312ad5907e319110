"""The output of a traced request."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.outputs import CompletionOutput

from vllm_twotower.trace import DiffusionTrace


@dataclass(repr=False)
class TracedCompletionOutput(CompletionOutput):
    """vLLM's output with the trace of its tokens.

    vLLM puts outputs of a stream together that wait for their reader; the trace follows the tokens.
    """

    _of_request: DiffusionTrace = field(default_factory=DiffusionTrace)
    _start: int = 0

    @classmethod
    def of(cls, output: CompletionOutput, of_request: DiffusionTrace, start: int) -> TracedCompletionOutput:
        """The output, whose first token is number ``start`` of the request's."""
        traced = cls.__new__(cls)
        traced.__dict__.update(vars(output), _of_request=of_request, _start=start)
        return traced

    @property
    def diffusion_trace(self) -> DiffusionTrace:
        """What was decided of the output's tokens, when, and how surely."""
        return self._of_request.part(self._start, self._start + len(self.token_ids))
