"""Options that beam search would lose (upstream: vllm/entrypoints/openai/*/protocol.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace

PROTOCOLS = "vllm.entrypoints.openai"
COMPLETION = f"{PROTOCOLS}.completion.protocol:CompletionRequest.to_beam_search_params"
CHAT = f"{PROTOCOLS}.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params"
CHECKED = {
    COMPLETION: {
        "0.32.0": "5f111a37e56204b558a072d2f9b7cca95f63ca6a7d4a92e57ac7e50a77ca5a15",
        "0.33.0": "fc57c1a916d15a1597cba064e667c12bbbb4381e7d1ab21386689a598a363992",
    },
    CHAT: {
        "0.32.0": "8193369848c97572ad8d115050a33fd0a643225c7c6a0352116e5bf2137cdbf8",
        "0.33.0": "d2efc158cf6e63a060e9979cb0274c1c3f70966a7d271c75e07414ab26e2d94e",
    },
}


def install_refusal(target: str) -> None:
    """Refuse a beam search with options of ours, whichever the model: nothing would read them."""
    holder, name = locate(target)
    upstream_convert = getattr(holder, name)

    @functools.wraps(upstream_convert)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        lost = {name: value for name, value in (self.vllm_xargs or {}).items() if name.startswith("diffusion_")}
        if lost:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                f"vllm_xargs {lost} has no effect with use_beam_search, which runs in the server's default mode: leave "
                "the diffusion_* options out.",
                parameter="vllm_xargs",
                value=lost,
            )
        return upstream_convert(self, *args, **kwargs)

    replace(target, to_beam_search_params)


PATCHES = tuple(
    Patch(
        name=name,
        target=target,
        what=f"{target.partition(':')[2]} refuses diffusion_* in vllm_xargs.",
        why="BeamSearchParams has no place for them: vLLM drops vllm_xargs of a beam search in silence.",
        upstream="not reported",
        remove_when="vLLM gives the requests of a beam search the vllm_xargs of the request they belong to",
        applies_when=everywhere,
        sources=(target, "vllm.sampling_params:BeamSearchParams"),
        source_sha256=CHECKED[target],
        install=functools.partial(install_refusal, target),
    )
    for name, target in (("beam-search-completion", COMPLETION), ("beam-search-chat", CHAT))
)
