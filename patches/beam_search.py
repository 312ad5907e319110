"""Options that beam search would lose (upstream: vllm/entrypoints/serve/engine/serving.py)."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def refusing_options(upstream_check: Callable) -> Callable:
    """Refuse a beam search with options of ours: nothing would read them."""

    @functools.wraps(upstream_check)
    async def check_model(self: Any, request: Any) -> Any:
        if getattr(request, "use_beam_search", False) and serves_two_tower(self.model_config):
            refuse_options(request)
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
