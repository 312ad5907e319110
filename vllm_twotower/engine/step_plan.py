"""Which tokens of which rows each tower runs in one engine step.

A scheduled row is a prompt chunk, which the context tower reads; or a canvas. A canvas row that holds tokens the
context tower has not read (a finished block, an autoregressive request's next token) commits them first, and a canvas
that is still being filled runs through the denoiser. With the lazy commit one row does both in one step: the context
tower reads the finished block, and the denoiser starts the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twotower.model.denoiser import CanvasRows

from .request_table import RequestTable


@dataclass
class TowerRows:
    """Rows of one tower, still on the host: for row i, ``lengths[i]`` tokens from position ``starts[i]`` on.

    ``batch_rows`` (n,) are the rows of vLLM's batch they belong to; ``sources`` (n,) where their tokens lie.
    """

    batch_rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.batch_rows)

    def ordered(self, order: np.ndarray) -> TowerRows:
        """The rows in another order."""
        return TowerRows(*(column[order] for column in vars(self).values()))

    @property
    def query_start_loc(self) -> np.ndarray:
        """(n + 1,) int32: where each row's tokens begin."""
        return np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int32)

    @property
    def seq_lens(self) -> np.ndarray:
        return self.starts + self.lengths

    def row_of_token(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), self.lengths)

    def spread(self, firsts: np.ndarray) -> np.ndarray:
        """(T,): ``firsts[i], firsts[i] + 1, ...`` for the tokens of row i."""
        offsets = np.arange(self.lengths.sum()) - np.repeat(self.query_start_loc[:-1], self.lengths)
        return np.repeat(firsts, self.lengths) + offsets


@dataclass
class RowSplit:
    """What each row of vLLM's batch does in this step.

    ``context`` and ``canvas`` are the towers' rows. Masks over the batch's rows: ``commits`` (tokens the context tower
    reads were pending), ``emits`` (these tokens are also returned in this step), ``next_token`` (the context head
    gives the row's next token).
    """

    context: TowerRows
    canvas: TowerRows
    commits: np.ndarray
    emits: np.ndarray
    next_token: np.ndarray


def split_rows(
    slots: np.ndarray,
    num_scheduled: np.ndarray,
    num_computed: np.ndarray,
    prefill_len: np.ndarray,
    query_start: np.ndarray,
    table: RequestTable,
    max_model_len: int,
    lazy_commit: bool,
) -> RowSplit:
    """Decides what each row does; every argument but the last three is (rows,).

    ``query_start`` is where a row's tokens begin in vLLM's batch. A canvas that was scheduled in part, because the
    token budget ran out, does nothing; near ``max_model_len`` a canvas is as wide as the room left.
    """
    width, pending, is_ar = table.width[slots], table.pending[slots], table.is_ar[slots]
    prefill = num_computed < prefill_len
    whole = ~prefill & (num_scheduled == np.minimum(width, max_model_len - num_computed))
    commits = whole & (pending > 0)
    emits = commits if not lazy_commit else commits & is_ar
    denoises = whole & ~is_ar & (lazy_commit | (pending == 0))
    next_token = is_ar & (commits | (prefill & (num_computed + num_scheduled >= prefill_len)))

    # Token sources: first the pending tokens of all slots, then vLLM's input ids.
    slot_tokens = slots * table.engine.canvas_length
    rows = np.flatnonzero(prefill | commits)
    committing = commits[rows]
    context = TowerRows(
        rows,
        np.where(committing & ~emits[rows], num_computed[rows] - pending[rows], num_computed[rows]),
        np.where(committing, pending[rows], num_scheduled[rows]),
        np.where(committing, slot_tokens[rows], table.pending_tokens.numel() + query_start[rows]),
    )
    # vLLM's Mamba metadata takes one-token rows with a state for decodes, which come first (mamba_attn.py).
    context = context.ordered(np.argsort(~((context.lengths == 1) & (context.starts > 0)), kind="stable"))
    rows = np.flatnonzero(denoises)
    canvas = TowerRows(rows, num_computed[rows], num_scheduled[rows], slot_tokens[rows])
    return RowSplit(context, canvas, commits, emits, next_token)


@dataclass
class ContextInputs:
    """The context tower's tokens (T,), their positions, and the tokens whose logits are needed (or None)."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor | None


@dataclass
class CanvasInputs:
    """The denoiser's tokens (T,), how they lie in rows, and what the sampler needs of the rows.

    ``slots``, ``batch_rows``, ``starts`` (the canvas's first position), ``lengths`` and ``masked_fraction`` are (R,);
    ``places`` (T,) is where each token lies in the R canvases of the served length S, flattened; ``valid`` (R, S) are
    the positions that exist.
    """

    input_ids: torch.Tensor
    rows: CanvasRows
    slots: torch.Tensor
    batch_rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    valid: torch.Tensor
    masked_fraction: torch.Tensor


@dataclass
class StepPlan:
    """All that the model and the sampler need for one step."""

    split: RowSplit
    context: ContextInputs | None
    canvas: CanvasInputs | None
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)


def context_inputs(split: RowSplit, table: RequestTable, input_ids: torch.Tensor) -> ContextInputs | None:
    """The context tower's tokens, gathered from pending blocks and vLLM's input ids (T,)."""
    rows, device = split.context, input_ids.device
    if not len(rows):
        return None
    sources = async_tensor_h2d(rows.spread(rows.sources), device=device)
    last = (rows.query_start_loc[1:] - 1)[split.next_token[rows.batch_rows]]
    return ContextInputs(
        input_ids=torch.cat((table.pending_tokens.view(-1), input_ids))[sources],
        positions=async_tensor_h2d(rows.spread(rows.starts), device=device),
        logits_indices=async_tensor_h2d(last, device=device, dtype=torch.int64) if len(last) else None,
    )


def canvas_inputs(
    split: RowSplit, table: RequestTable, slots: np.ndarray, state_indices: Mapping[str, torch.Tensor]
) -> CanvasInputs | None:
    """The denoiser's tokens and rows; ``slots`` are those of vLLM's batch, ``state_indices`` as in ``CanvasRows``."""
    rows, device = split.canvas, table.canvas.device
    if not len(rows):
        return None
    served, width = table.engine.canvas_length, int(rows.lengths.max())
    device_slots = async_tensor_h2d(slots[rows.batch_rows], device=device)
    lengths = async_tensor_h2d(rows.lengths, device=device)
    valid = torch.arange(served, device=device) < lengths[:, None]
    canvas = table.canvas[device_slots]
    masked = ((canvas == table.engine.mask_token_id) & valid).sum(1)
    places = async_tensor_h2d(rows.spread(np.arange(len(rows)) * served), device=device)
    ragged = bool((rows.lengths != width).any())
    firsts = rows.query_start_loc[:-1]
    token_of_position = np.minimum(firsts[:, None] + np.arange(width), rows.query_start_loc[1:, None] - 1).ravel()
    return CanvasInputs(
        input_ids=canvas.view(-1)[places],
        rows=CanvasRows(
            num_rows=len(rows),
            width=width,
            row_of_token=async_tensor_h2d(rows.row_of_token(), device=device),
            token_of_position=async_tensor_h2d(token_of_position, device=device, dtype=torch.int64) if ragged else None,
            position_of_token=async_tensor_h2d(rows.spread(np.arange(len(rows)) * width), device=device)
            if ragged
            else None,
            state_indices=state_indices,
        ),
        slots=device_slots,
        batch_rows=async_tensor_h2d(rows.batch_rows, device=device),
        starts=async_tensor_h2d(rows.starts, device=device),
        lengths=lengths,
        places=places,
        valid=valid,
        masked_fraction=masked / lengths,
    )


def page_slots(rows: TowerRows, block_tables: Sequence[torch.Tensor], block_sizes: Sequence[int]) -> torch.Tensor:
    """Slots (groups, T) of the rows' tokens in the paged caches of each KV cache group.

    ``block_tables`` (one (n, blocks) a group) have the rows' order.
    """
    device = block_tables[0].device
    row = async_tensor_h2d(rows.row_of_token(), device=device)
    position = async_tensor_h2d(rows.spread(rows.starts), device=device)
    return torch.stack(
        [
            table[row, position // size].long() * size + position % size
            for table, size in zip(block_tables, block_sizes, strict=True)
        ]
    )
