"""Streaming: a block arrives whole, in one chunk; counts and texts are exact."""

from __future__ import annotations

from itertools import accumulate

import golden_data
import pytest
from serving import Server, token_request

TRIES = 5


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
    """A chunk for each block; a busy server puts those together that it has not sent yet, so not in every try."""
    request = token_request((5, 60, 7), max_tokens, diffusion_canvas_length=width, diffusion_confidence_threshold=1)
    blocks = [*range(width, max_tokens, width), max_tokens]
    for _ in range(TRIES):
        chunks, [usage] = stream(server, request)
        ends = list(accumulate(len(tokens) for _, tokens, _ in chunks))
        assert set(ends) <= set(blocks)
        assert [reason for _, _, reason in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, max_tokens, 3 + max_tokens)
        if ends == blocks:
            return
    pytest.fail(f"no stream had a chunk for each block; the last one had ends at {ends}")


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
