"""Generation with the plain model, batch of one: the oracle that the serving engine is compared with.

Mask diffusion is the confidence unmasking of the TwoTower paper (arXiv 2606.26493) as NVIDIA's released
``modeling_nemotron_twotower.py`` runs it, with every block ending at its first EOS in position order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers import LayerState
from .model import TwoTowerModel

MASKED_LOGIT = -1e12


@dataclass
class DenoiseStep:
    """One denoiser pass over a block: time, canvas before and after, and the logits (S, V)."""

    t: float
    canvas_in: list[int]
    canvas_out: list[int]
    logits: Tensor


@dataclass
class Generation:
    """New tokens (cut at ``max_new_tokens`` and after the first EOS), and every denoiser pass of every block."""

    tokens: list[int]
    blocks: list[list[DenoiseStep]] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        """Number of denoiser passes (network function evaluations)."""
        return sum(map(len, self.blocks))


def unmask_confident(logits: Tensor, canvas: Tensor, step: int, steps: int, gamma: float, mask_token_id: int) -> Tensor:
    """One step of confidence unmasking on logits (S, V) and canvas (S,): the canvas with more tokens committed.

    Of n masked positions the ``min(n, max(#(confidence > gamma), 1, ceil(n / (steps - step))))`` most confident are
    committed; the confidence is the probability of the arg max.
    """
    logits = logits.float().clone()
    logits[:, mask_token_id] = MASKED_LOGIT
    confidence, prediction = logits.softmax(-1).max(-1)
    masked = canvas == mask_token_id
    n = int(masked.sum())
    k = min(n, max(int((confidence[masked] > gamma).sum()), 1, -(-n // (steps - step))))
    chosen = confidence.masked_fill(~masked, -1).topk(k).indices
    return canvas.index_copy(0, chosen, prediction[chosen])


def _cut(tokens: list[int], max_new_tokens: int, eos_token_id: int | None) -> list[int]:
    tokens = tokens[:max_new_tokens]
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


@torch.inference_mode()
def generate_mask_diffusion(
    model: TwoTowerModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    block_size: int = 16,
    steps: int = 16,
    gamma: float = 0.8,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Generation:
    """Fills blocks of ``block_size`` tokens after the prompt, greedily, until ``max_new_tokens`` or the EOS token.

    ``steps`` is the largest number of denoiser passes a block may take, ``gamma`` the confidence threshold.
    """
    mask_id = model.config.mask_token_id if mask_token_id is None else mask_token_id
    device = model.lm_head.weight.device
    result = Generation([])
    _, state = model.advance_context(torch.tensor([list(prompt)], device=device), None)
    while len(result.tokens) < max_new_tokens and eos_token_id not in result.tokens:
        canvas = torch.full((block_size,), mask_id, device=device)
        passes: list[DenoiseStep] = []
        while (masked := int((canvas == mask_id).sum())) > 0:
            t = masked / block_size
            logits = model.denoiser_logits(canvas, state, torch.tensor([t], device=device))
            after = unmask_confident(logits, canvas, len(passes), steps, gamma, mask_id)
            passes.append(DenoiseStep(t, canvas.tolist(), after.tolist(), logits))
            canvas = after
        result.blocks.append(passes)
        result.tokens += canvas.tolist()
        _, state = model.advance_context(canvas[None], state)
    result.tokens = _cut(result.tokens, max_new_tokens, eos_token_id)
    return result


@torch.inference_mode()
def generate_ar(
    model: TwoTowerModel, prompt: Sequence[int], max_new_tokens: int, *, eos_token_id: int | None = None
) -> Generation:
    """Greedy next-token generation with the context tower and its head."""
    device = model.lm_head.weight.device
    tokens: list[int] = []
    logits, state = model.advance_context(torch.tensor([list(prompt)], device=device), None)
    while len(tokens) < max_new_tokens and eos_token_id not in tokens:
        tokens.append(int(logits.argmax()))
        logits, state = model.advance_context(torch.tensor([tokens[-1:]], device=device), state)
    return Generation(tokens)


@torch.inference_mode()
def generate_mock_ar(
    model: TwoTowerModel, prompt: Sequence[int], max_new_tokens: int, *, eos_token_id: int | None = None
) -> Generation:
    """Greedy next-token generation with the denoiser, a debugging mode.

    The denoiser, without time conditioning, runs on the last token alone, over the context tower's state of all
    tokens before it.
    """
    device = model.lm_head.weight.device
    tokens: list[int] = []
    pending = torch.tensor(list(prompt), device=device)
    state: list[LayerState] | None = None
    while len(tokens) < max_new_tokens and eos_token_id not in tokens:
        if len(pending) > 1:
            _, state = model.advance_context(pending[None, :-1], state)
        tokens.append(int(model.denoiser_logits(pending[-1:], state, None)[-1].argmax()))
        pending = torch.cat((pending[-1:], torch.tensor(tokens[-1:], device=device)))
    return Generation(tokens)
