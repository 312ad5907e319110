"""What a pass of the towers runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_twotower.model.denoiser import CanvasRows

from .targets import Canvases, NextTokens


@dataclass
class ContextInputs:
    """The context tower's tokens (T,), their positions, and the tokens whose logits are needed (or None).

    ``prompt_tokens`` (2, n), if a prompt's log-probabilities are asked for: indices of prompt tokens here, and where
    they lie in vLLM's batch.
    """

    input_ids: Tensor
    positions: Tensor
    logits_indices: Tensor | None
    prompt_tokens: Tensor | None


@dataclass
class CanvasInputs:
    """The denoiser's tokens (T,), how they lie in rows, and each row's time (R,)."""

    input_ids: Tensor
    rows: CanvasRows
    time: Tensor


@dataclass
class PassPlan:
    """The inputs of the towers that run in a pass, and the positions that it has logits for.

    ``metadata`` and ``slot_mapping`` are vLLM's for attention, by layer name.
    """

    context: ContextInputs | None = None
    next_tokens: NextTokens | None = None
    canvas: CanvasInputs | None = None
    canvases: Canvases | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    slot_mapping: dict[str, Tensor] = field(default_factory=dict)
