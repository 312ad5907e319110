"""Which tokens of which rows each tower runs in one engine step.

A scheduled row is a prompt chunk, which the context tower reads; or a canvas; or the newest token of an autoregressive
request. A canvas row that holds a block the context tower has not read commits it first, and a canvas that is still
being filled runs through the denoiser. One row can do both in one step: the context tower reads a finished block, or
the last of a prompt, and the denoiser starts the next block.

If Mamba states of generated text are cached, the context tower stops where they are. What a block has behind that
position is read in the next step, and only then does the request go on.

An ``ar`` row is as in any causal model: the context tower reads its newest token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_twotower.model.denoiser import CanvasRows

from .blocks import Blocks
from .request_table import RequestTable
from .staging import Staging
from .tower_rows import TowerRows


@dataclass
class RowSplit:
    """What each row of vLLM's batch does in this step.

    The rows of the context tower, and the ``blocks`` of the denoiser. Masks over the batch's rows: ``commits`` (tokens
    the context tower reads were pending), ``next_token`` (the context head gives the row's next token). ``others_wait``
    says whether further passes over the blocks would keep other rows waiting. ``still_pending`` (rows,): how many
    tokens will be pending after the context tower's pass.
    """

    context: TowerRows
    blocks: TowerRows
    commits: np.ndarray
    next_token: np.ndarray
    others_wait: bool
    still_pending: np.ndarray


def split_rows(
    slots: np.ndarray,
    num_scheduled: np.ndarray,
    num_computed: np.ndarray,
    prefill_len: np.ndarray,
    query_start: np.ndarray,
    table: RequestTable,
    max_model_len: int,
    commit_interval: int,
) -> RowSplit:
    """Decides what each row does; every argument but the last three is (rows,).

    ``query_start`` is where a row's tokens begin in vLLM's batch. The last chunk of a prompt is followed by the first
    canvas, in pages that the scheduler has reserved. A canvas that was scheduled in part, because the token budget ran
    out, does nothing; near ``max_model_len`` a canvas is as wide as the room left. An ``auto`` row is autoregressive in
    this step if a single token is scheduled, or if its prompt ends and the request is to start so; that token is
    returned, and counts as computed, before the context tower has read it, like a block. Commits stop at multiples of
    ``commit_interval``.
    """
    width, pending, read, is_ar, is_auto = (
        column[slots] for column in (table.width, table.pending, table.read, table.is_ar, table.is_auto)
    )
    prefill = num_computed < prefill_len
    ends = num_computed + num_scheduled
    ends_prefill = prefill & (ends >= prefill_len)
    single = is_auto & np.where(prefill, ends_prefill & table.starts_with_ar[slots], num_scheduled == 1)
    whole = ~prefill & (single | (num_scheduled == np.minimum(width, max_model_len - num_computed)))
    commits = whole & (pending > 0)
    # A block is returned before it is committed, so its tokens lie before the scheduled ones.
    starts = num_computed - (commits & ~is_ar) * pending
    committed = commits * np.minimum(pending, commit_interval - starts % commit_interval)
    is_read = committed == pending
    next_token = (is_ar | single) & ((commits & is_read) | ends_prefill)
    denoises = ~is_ar & ~single & (ends_prefill | (whole & is_read))

    # Where a row's tokens lie: in the table, a canvas's length a slot, or after it, among vLLM's input ids.
    in_table = slots * table.engine.canvas_length
    in_batch = table.canvas.numel() + query_start
    lengths = np.where(commits, committed, num_scheduled)
    rows = np.flatnonzero(prefill | commits)
    context = TowerRows(rows, starts[rows], lengths[rows], np.where(commits, in_table + read, in_batch)[rows])
    if len(rows) > 1:
        # vLLM's Mamba metadata takes one-token rows with a state for decodes, which come first (mamba_attn.py).
        context = context.take(np.argsort(~((context.lengths == 1) & (context.starts > 0)), kind="stable"))

    rows = np.flatnonzero(denoises)
    starts = np.where(prefill, ends, num_computed)[rows]
    blocks = TowerRows(rows, starts, np.minimum(width[rows], max_model_len - starts), in_table[rows])
    return RowSplit(context, blocks, commits, next_token, not denoises.all(), pending - committed)


@dataclass
class ContextInputs:
    """The context tower's tokens (T,), their positions, and the tokens whose logits are needed (or None).

    ``prompt_tokens`` (2, n), if a prompt's log-probabilities are asked for: indices of prompt tokens here, and where
    they lie in vLLM's batch.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor | None
    prompt_tokens: torch.Tensor | None


@dataclass
class CanvasInputs:
    """The denoiser's tokens (T,), how they lie in rows, and each row's time (R,)."""

    input_ids: torch.Tensor
    rows: CanvasRows
    time: torch.Tensor


@dataclass
class StepPlan:
    """All that the model and the sampler need for one step."""

    split: RowSplit
    context: ContextInputs | None
    canvas: CanvasInputs | None
    blocks: Blocks | None
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)


def context_inputs(
    split: RowSplit,
    table: RequestTable,
    slots: np.ndarray,
    query_start: np.ndarray,
    input_ids: torch.Tensor,
    staging: Staging,
) -> ContextInputs | None:
    """The context tower's tokens, gathered from pending blocks and vLLM's input ids (T,); arguments as vLLM's batch."""
    rows = split.context
    if not len(rows):
        return None
    sources = staging.put(rows.spread(rows.sources))
    positions = staging.put(rows.spread(rows.starts))
    last = (rows.query_start_loc[1:] - 1)[split.next_token[rows.batch_rows]]
    logits_indices = staging.put(last) if len(last) else None
    scored = table.scores_prompt[slots[rows.batch_rows]] & ~split.commits[rows.batch_rows]
    prompt_tokens = None
    if scored.any():
        in_batch = rows.spread(query_start[rows.batch_rows])
        chosen = np.flatnonzero(scored[rows.row_of_token])
        prompt_tokens = staging.put(np.concatenate((chosen, in_batch[chosen]))).view(2, -1)
    staging.send()
    return ContextInputs(
        torch.cat((table.pending_tokens.view(-1), input_ids))[sources], positions, logits_indices, prompt_tokens
    )


def canvas_rows(rows: TowerRows, state_indices: Mapping[str, torch.Tensor], staging: Staging) -> CanvasRows:
    """How the denoiser's tokens lie in rows; ``state_indices`` as in ``CanvasRows``."""
    width = int(rows.lengths.max())
    token_of_position = position_of_token = without_context = None
    if (rows.lengths != width).any():
        firsts, ends = rows.query_start_loc[:-1, None], rows.query_start_loc[1:, None]
        token_of_position = staging.put(np.minimum(firsts + np.arange(width), ends - 1).ravel())
        position_of_token = staging.put(rows.spread(np.arange(len(rows)) * width))
    if not rows.starts.all():
        without_context = staging.put(rows.starts == 0)
    row_of_token = staging.put(rows.row_of_token)
    staging.send()
    return CanvasRows(
        num_rows=len(rows),
        width=width,
        row_of_token=row_of_token,
        token_of_position=token_of_position,
        position_of_token=position_of_token,
        state_indices=state_indices,
        without_context=None if without_context is None else without_context.bool(),
    )


def page_slots(
    rows: TowerRows, positions: np.ndarray, block_table: torch.Tensor, block_size: int, staging: Staging
) -> torch.Tensor:
    """Slots (T,) of tokens at ``positions`` (T,) in a paged cache whose block table (n, blocks) has the rows' order."""
    pages, offsets = np.divmod(positions, block_size)
    row, page, offset = (staging.put(values) for values in (rows.row_of_token, pages, offsets))
    staging.send()
    return block_table[row, page].long() * block_size + offset
