"""Which tokens of which rows each tower runs in one engine step.

A scheduled row is a prompt chunk, which the context tower reads; or a canvas; or the newest token of an autoregressive
request. A canvas row that holds a block the context tower has not read commits it first, and a canvas that is still
being filled runs through the denoiser. With the lazy commit one row does both in one step: the context tower reads the
finished block, and the denoiser starts the next.

If Mamba states of generated text are cached, the context tower stops where they are. What a block has behind that
position is read in the next step, and only then does the denoiser go on.

An ``ar`` row is as in any causal model: the context tower reads its newest token. A ``mock_ar`` row, NVIDIA's debugging
mode, runs the denoiser without time conditioning on the newest token alone, after the context tower has read the token
before it; so the last prompt token is the denoiser's too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twotower.model.denoiser import CanvasRows
from vllm_twotower.sampling.row_options import RowOptions

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

    ``context`` and ``canvas`` are the towers' rows; the last ``num_mock_ar`` canvas rows are the single tokens of
    ``mock_ar`` requests, the others blocks. Masks over the batch's rows: ``commits`` (tokens the context tower reads
    were pending), ``emits`` (the pending tokens are also returned in this step), ``next_token`` (the context head gives
    the row's next token). ``still_pending`` (rows,): how many tokens will be pending after the pass.
    """

    context: TowerRows
    canvas: TowerRows
    num_mock_ar: int
    commits: np.ndarray
    emits: np.ndarray
    next_token: np.ndarray
    still_pending: np.ndarray

    @cached_property
    def blocks(self) -> TowerRows:
        """The canvas rows that are blocks."""
        return self.canvas.ordered(np.arange(len(self.canvas) - self.num_mock_ar))

    @property
    def mock_ar(self) -> TowerRows:
        """The canvas rows that are single tokens of ``mock_ar`` requests."""
        return self.canvas.ordered(np.arange(len(self.canvas) - self.num_mock_ar, len(self.canvas)))


def split_rows(
    slots: np.ndarray,
    num_scheduled: np.ndarray,
    num_computed: np.ndarray,
    prefill_len: np.ndarray,
    query_start: np.ndarray,
    table: RequestTable,
    max_model_len: int,
    lazy_commit: bool,
    commit_interval: int,
) -> RowSplit:
    """Decides what each row does; every argument but the last four is (rows,).

    ``query_start`` is where a row's tokens begin in vLLM's batch. A canvas that was scheduled in part, because the
    token budget ran out, does nothing; near ``max_model_len`` a canvas is as wide as the room left. Commits stop at
    multiples of ``commit_interval``.
    """
    width, pending, read, is_ar, is_mock = (
        column[slots] for column in (table.width, table.pending, table.read, table.is_ar, table.is_mock_ar)
    )
    prefill = num_computed < prefill_len
    ends_prefill = prefill & (num_computed + num_scheduled >= prefill_len)
    whole = ~prefill & (num_scheduled == np.minimum(width, max_model_len - num_computed))
    commits = whole & (pending > 0)
    emits = commits & ~is_ar & ~is_mock & (not lazy_commit) & (read == 0)
    # Tokens that were returned before they are committed lie before the scheduled ones.
    behind = commits & ~is_ar & ~emits
    starts = num_computed - behind * pending
    committed = commits * np.minimum(pending, commit_interval - starts % commit_interval)
    next_token = is_ar & (commits | ends_prefill)
    mock = is_mock & (whole | ends_prefill)
    denoises = whole & ~is_ar & ~is_mock & ~emits & (committed == pending)

    # Where a row's tokens lie: in the table, a canvas's length a slot, or after it, among vLLM's input ids.
    in_table = slots * table.engine.canvas_length
    in_batch = table.canvas.numel() + query_start
    lengths = np.where(commits, committed, num_scheduled - (mock & prefill))
    rows = np.flatnonzero((prefill | commits) & (lengths > 0))
    context = TowerRows(rows, starts[rows], lengths[rows], np.where(commits, in_table + read, in_batch)[rows])
    # vLLM's Mamba metadata takes one-token rows with a state for decodes, which come first (mamba_attn.py).
    context = context.ordered(np.argsort(~((context.lengths == 1) & (context.starts > 0)), kind="stable"))

    rows = np.concatenate((np.flatnonzero(denoises), np.flatnonzero(mock)))
    skipped = np.where(mock & prefill, num_scheduled - 1, 0)
    canvas = TowerRows(
        rows,
        (num_computed + skipped)[rows],
        (num_scheduled - skipped)[rows],
        np.where(prefill, in_batch + skipped, in_table)[rows],
    )
    return RowSplit(context, canvas, int(mock.sum()), commits, emits, next_token, pending - committed)


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
class BlockInputs:
    """What the sampler needs of the canvases that are blocks, R rows of T tokens.

    ``slots``, ``batch_rows``, ``starts`` (the canvas's first position) and ``lengths`` are (R,); ``places`` (T,) is
    where each token lies in the R canvases of the served length S, flattened; ``valid`` (R, S) are the positions that
    exist; ``masked`` (R, S) those still to fill; ``step`` (R,).
    """

    slots: torch.Tensor
    batch_rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    valid: torch.Tensor
    canvas: torch.Tensor
    masked: torch.Tensor
    step: torch.Tensor
    options: RowOptions
    strategy: np.ndarray
    """(R,) on the host: indices into the table's strategies."""

    @property
    def column(self) -> torch.Tensor:
        """(T,): where each token lies in its row."""
        return self.places % self.valid.shape[1]

    @cached_property
    def strategy_rows(self) -> list[tuple[int, torch.Tensor | None]]:
        """The strategies in use, each with the rows that use it; None where all rows do."""
        used = np.unique(self.strategy).tolist()
        if len(used) == 1:
            return [(used[0], None)]
        rows = [np.flatnonzero(self.strategy == index) for index in used]
        return [(i, async_tensor_h2d(r, device=self.slots.device)) for i, r in zip(used, rows, strict=True)]


@dataclass
class StepPlan:
    """All that the model and the sampler need for one step."""

    split: RowSplit
    context: ContextInputs | None
    canvas: CanvasInputs | None
    blocks: BlockInputs | None
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)


def context_inputs(
    split: RowSplit, table: RequestTable, slots: np.ndarray, query_start: np.ndarray, input_ids: torch.Tensor
) -> ContextInputs | None:
    """The context tower's tokens, gathered from pending blocks and vLLM's input ids (T,); arguments as vLLM's batch."""
    rows, device = split.context, input_ids.device
    if not len(rows):
        return None
    sources = async_tensor_h2d(rows.spread(rows.sources), device=device)
    last = (rows.query_start_loc[1:] - 1)[split.next_token[rows.batch_rows]]
    scored = table.scores_prompt[slots[rows.batch_rows]] & ~split.commits[rows.batch_rows]
    prompt_tokens = None
    if scored.any():
        in_batch = rows.spread(query_start[rows.batch_rows])
        chosen = np.flatnonzero(np.repeat(scored, rows.lengths))
        prompt_tokens = async_tensor_h2d(np.stack((chosen, in_batch[chosen])), device=device)
    return ContextInputs(
        input_ids=torch.cat((table.pending_tokens.view(-1), input_ids))[sources],
        positions=async_tensor_h2d(rows.spread(rows.starts), device=device),
        logits_indices=async_tensor_h2d(last, device=device, dtype=torch.int64) if len(last) else None,
        prompt_tokens=prompt_tokens,
    )


def block_inputs(split: RowSplit, table: RequestTable, slots: np.ndarray) -> BlockInputs | None:
    """The sampler's view of the canvases; ``slots`` are those of vLLM's batch."""
    rows, device, served = split.blocks, table.device, table.engine.canvas_length
    if not len(rows):
        return None
    host_slots = slots[rows.batch_rows]
    device_slots = async_tensor_h2d(host_slots, device=device)
    lengths = async_tensor_h2d(rows.lengths, device=device)
    valid = torch.arange(served, device=device) < lengths[:, None]
    canvas = table.canvas[device_slots]
    return BlockInputs(
        slots=device_slots,
        batch_rows=async_tensor_h2d(rows.batch_rows, device=device),
        starts=async_tensor_h2d(rows.starts, device=device),
        lengths=lengths,
        places=async_tensor_h2d(rows.spread(np.arange(len(rows)) * served), device=device),
        valid=valid,
        canvas=canvas,
        masked=(canvas == table.engine.mask_token_id) & valid,
        step=table.step[device_slots],
        options=table.options.rows(device_slots),
        strategy=table.strategy[host_slots],
    )


def canvas_inputs(
    split: RowSplit,
    table: RequestTable,
    blocks: BlockInputs | None,
    input_ids: torch.Tensor,
    state_indices: Mapping[str, torch.Tensor],
) -> CanvasInputs | None:
    """The denoiser's tokens and rows; ``input_ids`` (T,) are vLLM's, ``state_indices`` as in ``CanvasRows``."""
    rows, device = split.canvas, table.device
    if not len(rows):
        return None
    width = int(rows.lengths.max())
    ragged = bool((rows.lengths != width).any())
    firsts = rows.query_start_loc[:-1]
    token_of_position = np.minimum(firsts[:, None] + np.arange(width), rows.query_start_loc[1:, None] - 1).ravel()
    is_mock_ar = np.arange(len(rows)) >= len(rows) - split.num_mock_ar
    return CanvasInputs(
        input_ids=torch.cat((table.canvas.view(-1), input_ids))[
            async_tensor_h2d(rows.spread(rows.sources), device=device)
        ],
        rows=CanvasRows(
            num_rows=len(rows),
            width=width,
            row_of_token=async_tensor_h2d(rows.row_of_token(), device=device),
            token_of_position=async_tensor_h2d(token_of_position, device=device, dtype=torch.int64) if ragged else None,
            position_of_token=async_tensor_h2d(rows.spread(np.arange(len(rows)) * width), device=device)
            if ragged
            else None,
            state_indices=state_indices,
            unconditioned=async_tensor_h2d(is_mock_ar, device=device) if split.num_mock_ar else None,
            without_context=async_tensor_h2d(rows.starts == 0, device=device) if (rows.starts == 0).any() else None,
        ),
        time=torch.cat((_times(blocks, table), torch.ones(split.num_mock_ar, device=device))),
    )


def _times(blocks: BlockInputs | None, table: RequestTable) -> torch.Tensor:
    """The time (R,) of each block, as its strategy has it."""
    if blocks is None:
        return torch.empty(0, device=table.device)
    time = blocks.masked.sum(1) / blocks.lengths
    for index, rows in blocks.strategy_rows:
        of_strategy = table.strategies[index].time
        if rows is None:
            time = of_strategy(time, blocks.step, blocks.options)
        else:
            time[rows] = of_strategy(time[rows], blocks.step[rows], blocks.options.rows(rows))
    return time


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
