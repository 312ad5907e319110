"""Training batches, drawn from the corpus by (seed, stage, step) alone: the same again after a resume."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_twotower.training.config import DataConfig, DenoiserStageConfig
from vllm_twotower.training.corpus import Corpus, Document

SMALLEST_T = 1e-3


@dataclass(frozen=True)
class PackedSequence:
    """Documents one after the other, cut at sequence_length + block_size tokens (P)."""

    tokens: np.ndarray  # (P,) int64
    weights: np.ndarray  # (P,) float32
    ends: np.ndarray  # (P,) int64: position of the EOS of the token's document (past P if it was cut)
    answers: list[tuple[int, int]]  # (first position, position of the EOS) of every answer


@dataclass(frozen=True)
class ARBatch:
    """Next-token prediction: tokens (B, L) int64, targets (B, L) int64, weights (B, L) fp32.

    ``total_weight`` () is that of the whole batch of which this may be a part.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    total_weight: Tensor


@dataclass(frozen=True)
class DenoiserBatch:
    """N blocks of S tokens in each of B packed sequences.

    ``context_targets`` (B, L) and ``context_weights`` (B, L) are the sequences' next tokens. ``total_weight`` () and
    ``total_context_weight`` () are those of the whole batch, at masked positions and of next tokens.
    """

    tokens: Tensor  # (B, L) int64, clean
    block_starts: Tensor  # (B, N) int64, within 1 and L
    targets: Tensor  # (B, N, S) int64; EOS past the end of the document
    weights: Tensor  # (B, N, S) fp32
    masked: Tensor  # (B, N, S) bool, at least one in every block
    t: Tensor  # (B, N) fp32
    context_targets: Tensor
    context_weights: Tensor
    total_weight: Tensor
    total_context_weight: Tensor
    mask_token_id: int

    @property
    def canvas(self) -> Tensor:
        """The blocks as the denoiser sees them (B, N, S)."""
        return self.targets.masked_fill(self.masked, self.mask_token_id)


Batch = ARBatch | DenoiserBatch


def part_of(batch: Batch, start: int, step: int, device: torch.device) -> Batch:
    """Every ``step``-th sequence from ``start`` on, on a device."""
    parts: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            parts[name] = (value[start::step] if value.ndim else value).to(device, non_blocking=True)
    either: Any = batch
    return replace(either, **parts)


def step_rng(seed: int, stage: str, step: int) -> random.Random:
    """The source of everything random in one step."""
    return random.Random(f"{seed}/{stage}/{step}")


def pack(documents: Sequence[Document], length: int, prompt_weight: float) -> PackedSequence:
    """Concatenates documents until `length` tokens are full; the last one is cut."""
    bounds = np.cumsum([0, *(len(document.tokens) for document in documents)])
    if bounds[-1] < length:
        raise ValueError(f"{bounds[-1]} tokens do not fill a sequence of {length}")
    ends = bounds[1:] - 1
    answers = [
        (int(start) + document.answer_start, int(end))
        for start, end, document in zip(bounds, ends, documents, strict=False)
    ]
    return PackedSequence(
        np.concatenate([document.tokens for document in documents])[:length].astype(np.int64),
        np.concatenate([document.weights(prompt_weight) for document in documents])[:length],
        np.repeat(ends, np.diff(bounds))[:length],
        [answer for answer in answers if answer[0] < length],
    )


def draw_sequence(rng: random.Random, corpus: Corpus, config: DataConfig, block_size: int) -> PackedSequence:
    """A sequence of sequence_length + block_size tokens, packed with any documents of the corpus."""
    length = config.sequence_length + block_size
    documents, filled = [], 0
    while filled < length:
        documents.append(corpus.draw(rng))
        filled += len(documents[-1].tokens)
    return pack(documents, length, config.prompt_weight)


def make_ar_batch(rng: random.Random, batch_size: int, config: DataConfig, corpus: Corpus) -> ARBatch:
    """One step's batch of the context tower's stage."""
    sequences = [draw_sequence(rng, corpus, config, config.block_size) for _ in range(batch_size)]
    tokens, targets, weights = _next_tokens(sequences, config.sequence_length)
    return ARBatch(tokens, targets, weights, weights.sum())


def _next_tokens(sequences: list[PackedSequence], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the ones after them, and their weights, each (B, length)."""
    tokens = torch.from_numpy(np.stack([sequence.tokens[: length + 1] for sequence in sequences]))
    weights = torch.from_numpy(np.stack([sequence.weights[1 : length + 1] for sequence in sequences]))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights


def make_denoiser_batch(
    rng: random.Random, stage: DenoiserStageConfig, config: DataConfig, corpus: Corpus, step: int = 0
) -> DenoiserBatch:
    """The batch of one step of the denoiser's stage."""
    block_size = stage.block_size(step, config.block_size)
    sequences = [draw_sequence(rng, corpus, config, block_size) for _ in range(stage.batch_size)]
    numbers = np.random.default_rng(rng.getrandbits(64))
    starts = [_draw_starts(numbers, sequence, stage, config, block_size) for sequence in sequences]
    blocks = [
        _cut_blocks(sequence, of_sequence, config, block_size, corpus.special.eos)
        for sequence, of_sequence in zip(sequences, starts, strict=True)
    ]
    targets = np.stack([block for block, _ in blocks])
    t, masked = _draw_masks(numbers, targets.shape, stage.full_mask_share)
    weights = torch.from_numpy(np.stack([weights for _, weights in blocks]))
    tokens, context_targets, context_weights = _next_tokens(sequences, config.sequence_length)
    return DenoiserBatch(
        tokens=tokens,
        block_starts=torch.from_numpy(np.stack(starts)),
        targets=torch.from_numpy(targets),
        weights=weights,
        masked=torch.from_numpy(masked),
        t=torch.from_numpy(t),
        context_targets=context_targets,
        context_weights=context_weights,
        total_weight=(weights * torch.from_numpy(masked)).sum(),
        total_context_weight=context_weights.sum(),
        mask_token_id=corpus.special.mask,
    )


def _draw_starts(
    numbers: np.random.Generator,
    sequence: PackedSequence,
    stage: DenoiserStageConfig,
    config: DataConfig,
    block_size: int,
) -> np.ndarray:
    """Starts (N,) of a sequence's blocks.

    At inference blocks start where the prompt ends, and go on from there; a denoiser trained on another phase fails.
    Random starts are drawn in proportion to the loss weight of the token there, so few lie in prompts.
    """
    first, last = 1, config.sequence_length  # a block needs a context, if only BOS
    aligned = [position for start, end in sequence.answers for position in range(start, min(end, last) + 1, block_size)]
    wanted = round(stage.blocks_per_sequence * stage.answer_block_share)
    chosen = [aligned[i] for i in numbers.permutation(len(aligned))[:wanted]]
    weights = sequence.weights[first : last + 1]
    positions = numbers.choice(
        np.arange(first, last + 1), size=stage.blocks_per_sequence - len(chosen), p=weights / weights.sum()
    )
    return np.array(chosen + positions.tolist(), np.int64)


def _cut_blocks(
    sequence: PackedSequence, starts: np.ndarray, config: DataConfig, block_size: int, eos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N, S) and loss weights (N, S) of the blocks at `starts` (N,)."""
    positions = starts[:, None] + np.arange(block_size)
    past_end = positions > sequence.ends[starts][:, None]
    targets = np.where(past_end, eos, sequence.tokens[positions])
    weights = np.where(past_end, np.float32(config.fill_weight), sequence.weights[positions])
    return targets, weights


def _draw_masks(
    numbers: np.random.Generator, shape: tuple[int, int, int], full_mask_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """t (B, N) and masks (B, N, S): every token is masked with probability t, and one of them at any rate."""
    t = numbers.uniform(SMALLEST_T, 1, shape[:2]).astype(np.float32)
    t[numbers.random(shape[:2]) < full_mask_share] = 1
    draws = numbers.random(shape)
    masked = draws < t[..., None]
    np.put_along_axis(masked, draws.argmin(-1)[..., None], True, -1)
    return t, masked
