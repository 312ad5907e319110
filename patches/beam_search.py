"""Options that beam search would lose (upstream: vllm/entrypoints/serve/engine/serving.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace, serves_two_tower

CHECK = "vllm.entrypoints.serve.engine.serving:BaseServing._check_model"
OPENAI = "vllm.entrypoints.openai"


def install_refusal() -> None:
    """Refuse a beam search with options of ours: nothing would read them."""
    holder, name = locate(CHECK)
    upstream_check = getattr(holder, name)

    @functools.wraps(upstream_check)
    async def check_model(self: Any, request: Any) -> Any:
        if getattr(request, "use_beam_search", False) and serves_two_tower(self.model_config):
            refuse_options(request)
        return await upstream_check(self, request)

    replace(CHECK, check_model)


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


PATCHES = (
    Patch(
        name="beam-search",
        target=CHECK,
        what="BaseServing._check_model, with which every request begins, refuses diffusion_* in vllm_xargs of a "
        "TwoTower model's beam search.",
        why="BeamSearchParams has no place for them: vLLM drops vllm_xargs of a beam search in silence.",
        upstream="not reported",
        remove_when="vLLM gives the requests of a beam search the vllm_xargs of the request they belong to",
        applies_when=everywhere,
        sources=(
            CHECK,
            f"{OPENAI}.completion.serving:OpenAIServingCompletion.render_completion_request",
            f"{OPENAI}.completion.protocol:CompletionRequest.to_beam_search_params",
            f"{OPENAI}.chat_completion.serving:OpenAIServingChat.render_chat_request",
            f"{OPENAI}.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
            "vllm.sampling_params:BeamSearchParams",
        ),
        source_sha256={
            "0.32.0": "20bbd15a21de69ff89646f6aa1bfc4daa15e71d56fe60f57a657f77e420afbf1",
            "0.33.0": "30f552f80bc8ff139dc12a1dc8794d6bd776f6161d8c2cba7761b5c93d0e09b4",
        },
        install=install_refusal,
    ),
)
