"""Streaming: a block arrives whole, in one chunk; counts and texts are exact."""

from __future__ import annotations

import golden_data
import pytest
from serving import Server, token_request


def stream(server: Server, request: dict) -> tuple[list, list]:
    """Chunks with tokens (text, token ids, finish reason), and all usage figures that came along."""
    chunks, usages = [], []
    for event in server.openai.completions.create(
        model=server.model, stream=True, stream_options={"include_usage": True}, **request
    ):
        if event.usage is not None:
            usages.append(event.usage)
        chunks.extend((choice.text, choice.token_ids, choice.finish_reason) for choice in event.choices)
    return chunks, usages


@pytest.mark.parametrize("width", [16, 8, 5])
@pytest.mark.parametrize("max_tokens", [64, 50])
def test_one_chunk_per_block(server: Server, width: int, max_tokens: int) -> None:
    """With a threshold of 1 a block takes as many steps as it has tokens, so the client is never behind by a block."""
    request = token_request((5, 60, 7), max_tokens, diffusion_canvas_length=width, diffusion_confidence_threshold=1)
    chunks, usages = stream(server, request)
    full, rest = divmod(max_tokens, width)
    assert [len(tokens) for _, tokens, _ in chunks] == [width] * full + [rest] * (rest > 0)
    assert [reason for _, _, reason in chunks] == [None] * (len(chunks) - 1) + ["length"]
    [usage] = usages
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, max_tokens, 3 + max_tokens)


def test_chunks_put_together_are_the_golden(server: Server) -> None:
    for run in golden_data.diffusion_runs("A"):
        request = token_request(
            run.prompt,
            run.max_new_tokens,
            diffusion_confidence_threshold=run.gamma,
            diffusion_max_steps=run.steps,
            diffusion_canvas_length=run.block_size,
        )
        chunks, _ = stream(server, request)
        assert tuple(token for _, tokens, _ in chunks for token in tokens) == run.tokens


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_streamed_text_is_the_whole_text(server: Server, mode: str) -> None:
    request = token_request((5, 60, 7), 40, diffusion_mode=mode)
    [whole] = server.openai.completions.create(model=server.model, **request).choices
    chunks, _ = stream(server, request)
    assert "".join(text for text, _, _ in chunks) == whole.text


def test_stop_inside_a_block_ends_the_stream(server: Server) -> None:
    run = next(run for run in golden_data.diffusion_runs("A", "eos_runs") if len(run.tokens) % run.block_size)
    request = token_request(run.prompt, run.max_new_tokens, diffusion_confidence_threshold=run.gamma)
    request["extra_body"]["stop_token_ids"] = [run.eos_token_id]
    chunks, [usage] = stream(server, request)
    assert tuple(token for _, tokens, _ in chunks for token in tokens) == run.tokens
    assert chunks[-1][2] == "stop"
    assert usage.completion_tokens == len(run.tokens)
