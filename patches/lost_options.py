"""Options that the server would lose (upstream: vllm/entrypoints/serve/engine/serving.py)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower
from vllm_twotower.trace import TRACE


def refusing_options(upstream_check: Callable) -> Callable:
    """Refuse a beam search with options of ours, which nothing would read, and traces that no response has room for."""

    @functools.wraps(upstream_check)
    async def check_model(self: Any, request: Any) -> Any:
        if serves_two_tower(self.model_config):
            if getattr(request, "use_beam_search", False):
                refuse_options(request)
            refuse_trace(self, request)
        return await upstream_check(self, request)

    return check_model


def refuse_options(request: Any) -> None:
    """Raise VLLMValidationError if the request has diffusion_* options in vllm_xargs."""
    lost = {name: value for name, value in (request.vllm_xargs or {}).items() if name.startswith("diffusion_")}
    if lost:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"vllm_xargs {lost} has no effect with use_beam_search, which runs in the server's default mode: leave "
            "the diffusion_* options out.",
            parameter="vllm_xargs",
            value=lost,
        )


def refuse_trace(serving: Any, request: Any) -> None:
    """Raise VLLMValidationError if the request asks for a trace elsewhere than for completions and in chats."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    level = options_of(request).get(TRACE)
    # Other APIs are subclasses of these.
    if level not in (None, "none") and type(serving) not in (OpenAIServingChat, OpenAIServingCompletion):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"{TRACE}={level!r}: only the responses of /v1/completions and /v1/chat/completions have traces.",
            parameter=TRACE,
            value=level,
        )


def options_of(request: Any) -> Mapping[str, Any]:
    """The extra arguments of a request to any of vLLM's APIs."""
    params = getattr(request, "sampling_params", None)
    return getattr(request, "vllm_xargs", None) or getattr(params, "extra_args", None) or {}
