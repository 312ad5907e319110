"""What a pass of the towers runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_twotower.model.denoiser import CanvasRows

from .targets import Canvases, DraftedTokens, NextTokens
from .tower_rows import DeviceRows


@dataclass
class AttentionInputs:
    """vLLM's ``metadata`` of one tower's layers, and where their keys and values go, by layer name."""

    metadata: dict[str, Any]
    slot_mapping: dict[str, Tensor]


@dataclass
class ContextInputs:
    """The context tower's rows, their tokens (T,), and the tokens whose logits are needed, if any are.

    ``prompt_tokens`` (2, n), if a prompt's log-probabilities are asked for: indices of prompt tokens here, and where
    they lie in vLLM's batch.
    """

    attention: AttentionInputs
    rows: DeviceRows
    input_ids: Tensor
    logits_indices: Tensor | slice | None
    prompt_tokens: Tensor | None


@dataclass
class CanvasInputs:
    """The denoiser's tokens (T,), how they lie in rows, and each row's time (R,)."""

    attention: AttentionInputs
    input_ids: Tensor
    rows: CanvasRows
    time: Tensor


@dataclass
class PassPlan:
    """The inputs of what a pass runs, and the positions that it has logits for.

    The context tower reads what is certain (``context``) and what may be rejected (``drafts``), one after the other.
    """

    context: ContextInputs | None = None
    next_tokens: NextTokens | None = None
    drafts: ContextInputs | None = None
    drafted: DraftedTokens | None = None
    canvas: CanvasInputs | None = None
    canvases: Canvases | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(run.input_ids) for run in (self.context, self.drafts, self.canvas) if run is not None)
