"""What a pass of the towers runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_twotower.model.denoiser import CanvasRows
from vllm_twotower.model.step_logits import OutputHead

from .pass_graphs import Replay
from .targets import Canvases, DraftedTokens, NextTokens
from .tower_rows import DeviceRows


class Towers(Protocol):
    """The model: both towers and their heads."""

    context_head: OutputHead
    denoiser_head: OutputHead

    def context_tower(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (T, H) of tokens (T,)."""

    def denoise(self, input_ids: Tensor, rows: CanvasRows, time: Tensor) -> Tensor:
        """Hidden states (T, H) of canvas tokens (T,) at times (R,)."""


@dataclass
class AttentionInputs:
    """vLLM's ``metadata`` of one tower's layers, and where their keys and values go, by layer name.

    ``is_padding`` (T,) bool, if any tokens are inert: they share the experts of the first token.
    """

    metadata: dict[str, Any]
    slot_mapping: dict[str, Tensor]
    is_padding: Tensor | None = None

    def use(self) -> None:
        """Gives the layers of the run that comes next what they need."""
        context = get_forward_context()
        context.attn_metadata, context.slot_mapping = self.metadata, self.slot_mapping
        context.is_padding = self.is_padding


class _TowerInputs:
    make_attention: Callable[[], AttentionInputs]

    @cached_property
    def attention(self) -> AttentionInputs:
        """Made when the tower runs: what vLLM's builders made before for another run is no longer good then."""
        made = self.make_attention()
        del self.make_attention  # it holds the plan of the pass before
        return made


@dataclass
class ContextInputs(_TowerInputs):
    """The context tower's rows, their tokens (T,), and the tokens whose logits are needed, if any are.

    ``prompt_tokens`` (2, n), if a prompt's log-probabilities are asked for: indices of prompt tokens here, and where
    they lie in vLLM's batch.
    """

    make_attention: Callable[[], AttentionInputs]
    rows: DeviceRows
    input_ids: Tensor
    logits_indices: Tensor | slice | None = None
    prompt_tokens: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def run(self, model: Towers) -> Tensor:
        """Runs the context tower, in a forward context: hidden states (T, H)."""
        self.attention.use()
        return model.context_tower(self.input_ids, self.rows.positions)


@dataclass
class CanvasInputs(_TowerInputs):
    """The denoiser's tokens (T,), how they lie in rows, and each row's time (R,)."""

    make_attention: Callable[[], AttentionInputs]
    input_ids: Tensor
    rows: CanvasRows
    time: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def run(self, model: Towers) -> Tensor:
        """Runs the denoiser, in a forward context: hidden states (T, H)."""
        self.attention.use()
        return model.denoise(self.input_ids, self.rows, self.time)


@dataclass
class PassPlan:
    """The inputs of what a pass runs, or the graphs in their place, and the positions that it has logits for.

    The context tower reads what is certain (``context``) and what may be rejected (``drafts``), one after the other.
    """

    context: ContextInputs | Replay | None = None
    drafts: ContextInputs | Replay | None = None
    canvas: CanvasInputs | Replay | None = None
    next_tokens: NextTokens | None = None
    drafted: DraftedTokens | None = None
    canvases: Canvases | None = None

    @property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in (self.context, self.drafts, self.canvas) if run is not None)
