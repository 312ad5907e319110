"""Traces as an engine gives them, made by hand or by the plain model."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion
from vllm_twotower.trace import BlockTrace, DiffusionTrace
from vllm_twotower.watch.recording import Chunk

MASK = 3


def block_chunk(seconds: float, start: int, canvases: Sequence[Sequence[int]], confidence: Sequence[float]) -> Chunk:
    """A block that the denoiser filled; ``confidence`` has the returned tokens' probabilities, of the first ones."""
    canvases = [list(canvas) for canvas in canvases]
    returned = len(confidence)
    decided = [next(n for n, canvas in enumerate(canvases, 1) if canvas[i] != MASK) for i in range(returned)]
    times = [1.0, *(canvas.count(MASK) / len(canvas) for canvas in canvases[:-1])]
    block = BlockTrace(start, returned, len(canvases), None, None, times, canvases)
    trace = DiffusionTrace([0] * returned, decided, list(confidence), [0.1 * (1 - c) for c in confidence], [block])
    return Chunk(seconds, canvases[-1][:returned], trace)


def draft_chunk(seconds: float, start: int, known: int, draft: Sequence[int], accepted: int, own: int) -> Chunk:
    """A draft of one pass, of which ``accepted`` tokens stayed, with the context tower's ``own`` token behind them."""
    count = accepted + 1
    block = BlockTrace(start, count, 1, len(draft), accepted, [1.0], [[known, *draft]])
    trace = DiffusionTrace([0] * count, [1] * accepted + [None], [0.95] * count, [0.02] * count, [block])
    return Chunk(seconds, [*draft[:accepted], own], trace)


def context_chunk(seconds: float, tokens: Sequence[int], confidence: float = 0.9) -> Chunk:
    """Tokens that the context tower gave alone."""
    count = len(tokens)
    trace = DiffusionTrace([None] * count, [None] * count, [confidence] * count, [0.05] * count)
    return Chunk(seconds, list(tokens), trace)


def reference_chunks(
    model: TwoTowerModel, prompt: Sequence[int], max_tokens: int, gamma: float, eos: int, pass_seconds: float = 0.02
) -> list[Chunk]:
    """What an engine would give of a request, by the plain model."""
    found = generate_mask_diffusion(model, prompt, max_tokens, gamma=gamma, eos_token_id=eos)
    chunks, seconds, start = [], 0.0, 0
    for steps in found.blocks:
        seconds += pass_seconds * len(steps)
        count = min(16, len(found.tokens) - start)
        confidence = [0.0] * count
        for step in steps:
            logits = step.logits.float().clone()
            logits[:, MASK] = -1e12
            best = logits.softmax(-1).max(-1).values.tolist()
            for i in range(count):
                if step.canvas_in[i] == MASK != step.canvas_out[i]:
                    confidence[i] = best[i]
        chunks.append(block_chunk(seconds, start, [step.canvas_out for step in steps], confidence))
        start += count
    return chunks


def reference_ar_chunks(
    model: TwoTowerModel, prompt: Sequence[int], max_tokens: int, eos: int, pass_seconds: float = 0.02
) -> list[Chunk]:
    """The same token by token."""
    tokens = generate_ar(model, prompt, max_tokens, eos_token_id=eos).tokens
    return [context_chunk((i + 1) * pass_seconds, [token], 0.97) for i, token in enumerate(tokens)]
