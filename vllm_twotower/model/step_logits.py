"""What the model hands to the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class StepLogits:
    """Logits of a step: context head (A, V) for autoregressive rows, denoiser head (T, V) for canvas tokens.

    ``grammar`` holds, for requests with structured outputs, their ids and a bitmask (requests, V / 32) int32 of the
    tokens that may come next.
    """

    context: Tensor | None
    denoiser: Tensor | None
    grammar: tuple[Sequence[str], np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int]:
        """The number of logit rows: vLLM's runner applies a grammar if there are any."""
        return (sum(len(logits) for logits in (self.context, self.denoiser) if logits is not None),)
