"""What a pass of the towers runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_twotower.model.denoiser import CanvasRows

from .targets import Canvases, NextTokens
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
    """The inputs of the towers that run in a pass, and the positions that it has logits for."""

    context: ContextInputs | None = None
    next_tokens: NextTokens | None = None
    canvas: CanvasInputs | None = None
    canvases: Canvases | None = None

    @property
    def attention(self) -> AttentionInputs:
        """Those of both towers."""
        towers = [tower.attention for tower in (self.context, self.canvas) if tower is not None]
        metadata, slot_mapping = {}, {}
        for tower in towers:
            metadata |= tower.metadata
            slot_mapping |= tower.slot_mapping
        return AttentionInputs(metadata, slot_mapping)

    @property
    def num_tokens(self) -> int:
        return sum(len(tower.input_ids) for tower in (self.context, self.canvas) if tower is not None)
