"""What the model hands to the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class StepLogits:
    """Hidden states of a step, and the heads that make logits of them, a tile at a time.

    ``context`` (A, H) are those of the rows whose next token the context head gives, ``denoiser`` (T, H) those of the
    canvas tokens. Logits of all of these at once would be the largest tensors of the engine.
    ``grammar`` holds, for requests with structured outputs, their ids and a bitmask (requests, V / 32) int32 of the
    tokens that may come next.
    """

    context: Tensor | None
    denoiser: Tensor | None
    context_head: Callable[[Tensor], Tensor]
    denoiser_head: Callable[[Tensor], Tensor]
    tile: int
    """The most rows whose logits the sampler may ask for at once."""
    grammar: tuple[Sequence[str], np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int]:
        """The number of logit rows: vLLM's runner applies a grammar if there are any."""
        return (sum(len(hidden) for hidden in (self.context, self.denoiser) if hidden is not None),)


def logit_rows_per_tile(vocab_size: int, canvas_length: int, max_bytes: int = 256 << 20) -> int:
    """Rows of fp32 logits that ``max_bytes`` hold, and at least one canvas."""
    return max(canvas_length, max_bytes // (4 * vocab_size))
