"""Plans a pass: what the rows of a step let each tower run, made on the device of a few numbers that are sent there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower.model.context import UncommittedRead
from vllm_twotower.model.denoiser import DENOISER_PREFIX, CanvasRows

from .graph_choice import GraphChoice
from .pass_buffers import PassBuffers
from .pass_graphs import PassDescriptor, Replay
from .pass_plan import AttentionInputs, CanvasInputs, ContextInputs, PassPlan
from .prefix_cache import move_states, state_block_size, state_column
from .request_table import RequestTable
from .step_rows import StepRows
from .targets import Canvases, DraftedTokens, NextTokens
from .tower_rows import DeviceRows, TowerRows


class TowerGroups:
    """vLLM's attention groups of either tower, by KV cache group."""

    def __init__(self, attn_groups: list[list[AttentionGroup]]):
        self.context, self.denoiser = (
            [
                [group for group in groups if (DENOISER_PREFIX in group.layer_names[0]) == is_denoiser]
                for groups in attn_groups
            ]
            for is_denoiser in (False, True)
        )


@dataclass
class Step:
    """A step's rows; of vLLM's batch, by its rows (R,), where their tokens begin and how long their prompts are; the
    attention groups; and the pass planned last."""

    rows: StepRows
    query_start: np.ndarray
    prefill_len: np.ndarray
    groups: TowerGroups
    plan: PassPlan | None = None


class PassPlanner:
    """Plans passes for as long as the engine has one KV cache.

    ``text`` (max_num_reqs, max_model_len) int32 are the tokens of all requests, ``layers`` vLLM's by name.
    """

    def __init__(
        self,
        table: RequestTable,
        text: Tensor,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        layers: Mapping[str, Any],
    ):
        self.table, self._text, self._layers = table, text, layers
        self._buffers = PassBuffers(table.no_request, table.no_request, table.device)
        self._kv_cache_config, self._block_sizes = kv_cache_config, block_tables.block_sizes
        # Those of the rows of vLLM's batch, which it fills before every step.
        self._block_tables = block_tables.input_block_tables
        self.state_block_size = state_block_size(kv_cache_config, table.max_model_len)
        groups = enumerate(kv_cache_config.kv_cache_groups)
        self._mamba_groups = {group_id for group_id, group in groups if isinstance(group.kv_cache_spec, MambaSpec)}
        self._mamba_layers = {
            layer_name: group_id
            for group_id in self._mamba_groups
            for layer_name in kv_cache_config.kv_cache_groups[group_id].layer_names
        }

    def plan(self, step: Step, choice: GraphChoice | None = None) -> PassPlan:
        """The next pass, on what the rows need now; runs that the ``choice`` finds graphs for are replayed."""
        rows = step.rows
        context, gets_token = rows.take_context()
        drafts, canvases = rows.take_drafts(), rows.take_canvases()
        for reads in (context, drafts):
            self._move_states(reads)
        descs: Sequence[PassDescriptor | None] = (None, None, None)
        if choice is not None:
            descs = choice.find(rows, step.prefill_len, context, gets_token, drafts, canvases)
        buckets = [desc and (desc.num_reqs, desc.width) for desc in descs]
        sent = self._buffers.send(rows.slots, context, drafts, canvases, buckets)
        self._begin_drafts(rows, sent[-1])
        replays = [
            None
            if desc is None or choice is None
            else Replay(choice.graphs, desc, run, bool(self.table.traces.is_traced[run.host_slots].any()))
            for desc, run in zip(descs, sent, strict=True)
        ]
        step.plan = self.plan_towers(step, *sent, gets_token, *replays)
        return step.plan

    def plan_towers(
        self,
        step: Step,
        context: DeviceRows,
        drafts: DeviceRows,
        denoiser: DeviceRows,
        gets_token: np.ndarray,
        *replays: Replay | None,
    ) -> PassPlan:
        """The inputs of both towers, made on the device of what was sent there; ``replays`` need none.

        ``gets_token``: which of the context tower's rows get a next token.
        """
        of_context, of_drafts, of_canvas = replays or (None, None, None)
        plan = PassPlan(of_context, of_drafts, of_canvas)
        if len(context) and plan.context is None:
            self._plan_context(plan, step, context, gets_token)
        if len(drafts) and plan.drafts is None:
            plan.drafted, plan.drafts = self.draft_inputs(drafts, step.groups)
        if len(denoiser) and plan.canvas is None:
            before = step.plan
            plan.canvases = canvases = Canvases(denoiser, self.table)
            if before is not None and before.canvases is not None and before.canvases.has_rows_of(canvases):
                assert isinstance(before.canvas, CanvasInputs)
                kept = before.canvas.attention
                tokens, times = canvases.canvas.flatten(), canvases.times
                plan.canvas = replace(before.canvas, make_attention=lambda: kept, input_ids=tokens, time=times)
            else:
                plan.canvas = self.canvas_inputs(canvases, step.groups)
        return plan

    def canvas_inputs(self, canvases: Canvases, groups: TowerGroups) -> CanvasInputs:
        """A pass of the denoiser over canvases."""
        rows = canvases.rows
        tables = rows.block_tables(self._block_tables)
        attention = partial(self._attention, rows, tables, groups.denoiser, is_causal=False)
        of_states = CanvasRows(len(rows), rows.even_width, self._state_indices(rows.starts, tables))
        return CanvasInputs(attention, canvases.canvas.flatten(), of_states, canvases.times)

    def clear_buffers(self) -> None:
        """Puts rows of no request where passes find their rows."""
        self._buffers.clear()

    def buffered_rows(self, desc: PassDescriptor) -> DeviceRows:
        """The rows of a graph, whichever they are when it is replayed."""
        return self._buffers.rows(desc.run, desc.num_reqs, desc.width, self.table.max_model_len)

    def _plan_context(self, plan: PassPlan, step: Step, context: DeviceRows, gets_token: np.ndarray) -> None:
        """The context tower's part of a plan."""
        logits_indices: Tensor | slice | None = None
        if gets_token.any():
            rows = context
            if gets_token.all() and context.width == 1:
                logits_indices = slice(None)
            else:
                index = np.flatnonzero(gets_token)
                rows = context.take(index)
                logits_indices = context.on_device(context.host.query_start_loc[1:][index] - 1)
            num_returned = step.rows.num_new[rows.host.batch_rows]
            plan.next_tokens = NextTokens(rows.next_positions(), self.table, num_returned)
        attention = partial(self._context_attention, step.plan, step.groups, context)
        input_ids = self._tokens(context)
        prompt_tokens = self._prompt_tokens(step, context.host)
        plan.context = ContextInputs(attention, context, input_ids, logits_indices, prompt_tokens)

    def next_token_inputs(self, rows: DeviceRows, groups: TowerGroups) -> tuple[NextTokens, ContextInputs]:
        """The context tower's read of one token each, and the positions behind."""
        targets = NextTokens(rows.next_positions(), self.table, np.zeros(len(rows.host), dtype=np.int64))
        tables = rows.block_tables(self._block_tables)
        attention = partial(self._attention, rows, tables, groups.context, is_causal=True)
        return targets, ContextInputs(attention, rows, self._tokens(rows))

    def draft_inputs(self, drafts: DeviceRows, groups: TowerGroups) -> tuple[DraftedTokens, ContextInputs]:
        """The context tower's read of blocks that it is to verify, and the positions behind each of their tokens."""
        inputs = self.read_inputs(drafts, groups)
        of_row = inputs.input_ids.view(len(drafts), drafts.even_width)
        return DraftedTokens(drafts.behind_each_token(), self.table, of_row), inputs

    def read_inputs(self, rows: DeviceRows, groups: TowerGroups) -> ContextInputs:
        """The context tower's read of blocks; its Mamba states stay as they are until :meth:`advance_states`."""
        return ContextInputs(partial(self._uncommitted_attention, rows, groups), rows, self._tokens(rows).long())

    def _uncommitted_attention(self, rows: DeviceRows, groups: TowerGroups) -> AttentionInputs:
        # A page more, as rows that are filled up may reach beyond the last one.
        tables = [F.pad(table, (0, 1), value=NULL_BLOCK_ID) for table in rows.block_tables(self._block_tables)]
        attention = self._attention(rows, tables, self._without_mamba(groups.context), is_causal=True)
        states = self._state_indices(rows.starts + rows.lengths, tables)
        lengths = rows.lengths if rows.has_padding else None
        attention.metadata |= {name: UncommittedRead(len(rows), index, lengths) for name, index in states.items()}
        return attention

    def _without_mamba(self, groups: list[list[AttentionGroup]]) -> list[list[AttentionGroup]]:
        return [[] if group_id in self._mamba_groups else layers for group_id, layers in enumerate(groups)]

    def _tokens(self, rows: DeviceRows) -> Tensor:
        """(T,): the text at the rows' positions."""
        return self._text[rows.text_slots(self._text)[rows.row], rows.positions]

    def _begin_drafts(self, rows: StepRows, denoiser: DeviceRows) -> None:
        """Puts the newest token at the start of canvases that are drafts, before their first pass."""
        batch_rows = denoiser.host.batch_rows
        begins = np.flatnonzero(rows.is_verified[batch_rows] & (rows.denoiser_passes[batch_rows] == 1))
        if len(begins):
            drafts = denoiser.take(begins)
            self.table.canvas[drafts.slots, 0] = self._text[drafts.slots, drafts.starts].long()

    def advance_states(self, inputs: ContextInputs, counts: Tensor) -> None:
        """Lets Mamba states go on by the first ``counts`` (n,) tokens of the rows that were read."""
        for name in self._mamba_layers:
            self._layers[name].commit(inputs.attention.metadata[name], counts)

    def _context_attention(self, plan: PassPlan | None, groups: TowerGroups, rows: DeviceRows) -> AttentionInputs:
        """What the context tower's layers need; for Mamba layers as in the pass before if that was the same to them."""
        of_context, kept = groups.context, {}
        before = None if plan is None else plan.context
        if isinstance(before, ContextInputs) and self._continues(before.rows, rows):
            of_context = self._without_mamba(of_context)
            kept = {name: before.attention.metadata[name] for name in self._mamba_layers}
        attention = self._attention(rows, rows.block_tables(self._block_tables), of_context, is_causal=True)
        attention.metadata |= kept
        return attention

    def _continues(self, before: DeviceRows, rows: DeviceRows) -> bool:
        """Whether the rows go on by one token each where those of the pass before went on so too, in the same pages."""
        if not before.width == rows.width == 1 or len(before) != len(rows):
            return False
        first, second = (state_column(ends, self.state_block_size) for ends in (before.host.ends, rows.host.ends))
        is_same = (before.host.batch_rows == rows.host.batch_rows) & (first == second)
        return bool((is_same & (before.host.starts > 0)).all())

    def _prompt_tokens(self, step: Step, rows: TowerRows) -> Tensor | None:
        """See :class:`ContextInputs`; a chunk is read in the first pass of a step."""
        batch_rows = rows.batch_rows
        scored = self.table.scores_prompt[step.rows.slots[batch_rows]] & (rows.starts < step.prefill_len[batch_rows])
        if not scored.any():
            return None
        row = np.repeat(np.arange(len(rows)), rows.lengths)
        chosen = np.flatnonzero(scored[row])
        in_batch = (step.query_start[batch_rows] - rows.query_start_loc[:-1])[row] + np.arange(len(row))
        return async_tensor_h2d(np.stack((chosen, in_batch[chosen])), device=self.table.device)

    def _move_states(self, rows: TowerRows) -> None:
        move_states(
            rows,
            self.state_block_size,
            ((self._block_tables[group], self._layers[name].kv_cache) for name, group in self._mamba_layers.items()),
        )

    def _state_indices(self, num_tokens: Tensor, block_tables: list[Tensor]) -> dict[str, Tensor]:
        """The slot (n,) of the state after so many tokens (n,) of each row, by context layer."""
        columns = state_column(num_tokens, self.state_block_size)[:, None]
        of_group = {group: block_tables[group].gather(1, columns)[:, 0] for group in self._mamba_groups}
        return {name: of_group[group] for name, group in self._mamba_layers.items()}

    def _attention(
        self, rows: DeviceRows, block_tables: list[Tensor], groups: list[list[AttentionGroup]], is_causal: bool
    ) -> AttentionInputs:
        """What one tower's layers need beside hidden states.

        Under a causal mask a row's last token is the one that its sequence ends with. So where rows are filled up, the
        sequences are too; nobody but inert tokens looks at what is there.
        """
        slot_mapping: dict[str, Tensor] = {}
        slot_mappings: list[Tensor | None] = [None] * len(groups)
        for group_id, layers in enumerate(groups):
            if layers and group_id not in self._mamba_groups:
                slot_mappings[group_id] = rows.slot_mapping(block_tables[group_id], self._block_sizes[group_id])
                for group in layers:
                    slot_mapping.update(dict.fromkeys(group.layer_names, slot_mappings[group_id]))
        host = rows.host if rows.width is None else rows.host.widened(rows.width)
        ends, seq_lens = rows.host.ends, rows.starts + rows.lengths
        if is_causal and rows.has_padding:
            ends, seq_lens = host.ends, (rows.starts + rows.even_width).masked_fill(rows.lengths == 0, 0)
        metadata = build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(rows),
            num_tokens=rows.num_tokens,
            query_start_loc_gpu=rows.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(host.query_start_loc.astype(np.int32)),
            max_query_len=int(host.lengths.max()),
            seq_lens=seq_lens.int(),
            max_seq_len=int(ends.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=torch.from_numpy(ends.astype(np.int32)),
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            causal=is_causal,
        )
        return AttentionInputs(metadata, slot_mapping, rows.is_inert.flatten() if rows.has_padding else None)
