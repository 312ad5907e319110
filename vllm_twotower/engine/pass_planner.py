"""Plans a pass: what the rows of a step let each tower run, made on the device of a few numbers that are sent there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower.model.context import UncommittedRead
from vllm_twotower.model.denoiser import DENOISER_PREFIX, CanvasRows

from .pass_buffers import PassBuffers
from .pass_plan import AttentionInputs, CanvasInputs, ContextInputs, PassPlan
from .prefix_cache import move_states, state_block_size, state_column
from .request_table import RequestTable
from .step_rows import StepRows
from .targets import Canvases, DraftedTokens, NextTokens
from .tower_rows import DeviceRows, TowerRows


@dataclass
class Step:
    """A step's rows; of vLLM's batch, by its rows (R,), where their tokens begin and how long their prompts are; the
    attention groups, and those of either tower by KV cache group; and the pass planned last."""

    rows: StepRows
    query_start: np.ndarray
    prefill_len: np.ndarray
    attn_groups: list[list[AttentionGroup]]
    plan: PassPlan | None = None

    def __post_init__(self) -> None:
        self.context_groups, self.denoiser_groups = (
            [
                [group for group in groups if (DENOISER_PREFIX in group.layer_names[0]) == is_denoiser]
                for groups in self.attn_groups
            ]
            for is_denoiser in (False, True)
        )


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
        layers: Mapping[str, nn.Module],
    ):
        self.table, self._text, self._layers = table, text, layers
        self._buffers = PassBuffers(len(table.width), table.device)
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

    def plan(self, step: Step) -> PassPlan:
        """The next pass, on what the rows need now."""
        context, gets_token = step.rows.take_context()
        drafts = step.rows.take_drafts()
        for rows in (context, drafts):
            self._move_states(rows)
        sent = self._buffers.send(step.rows.slots, context, drafts, step.rows.take_canvases())
        self._begin_drafts(step.rows, sent[-1])
        step.plan = self.plan_towers(step, *sent, gets_token)
        return step.plan

    def plan_towers(
        self, step: Step, context: DeviceRows, drafts: DeviceRows, denoiser: DeviceRows, gets_token: np.ndarray
    ) -> PassPlan:
        """The inputs of both towers, made on the device of what was sent there.

        ``gets_token``: which of the context tower's rows get a next token.
        """
        plan = PassPlan()
        if len(context):
            self._plan_context(plan, step, context, gets_token)
        if len(drafts):
            self._plan_drafts(plan, step, drafts)
        if len(denoiser):
            plan.canvases = canvases = Canvases(denoiser, self.table)
            tokens, times = canvases.canvas.flatten(), canvases.times()
            before = step.plan
            if before is not None and before.canvases is not None and before.canvases.has_rows_of(canvases):
                plan.canvas = replace(before.canvas, input_ids=tokens, time=times)
            else:
                tables = denoiser.block_tables(self._block_tables)
                attention = self._attention(denoiser, tables, step.denoiser_groups, is_causal=False)
                rows = CanvasRows(len(denoiser), denoiser.width, self._state_indices(denoiser.starts, tables))
                plan.canvas = CanvasInputs(attention, tokens, rows, times)
        return plan

    def _plan_context(self, plan: PassPlan, step: Step, context: DeviceRows, gets_token: np.ndarray) -> None:
        """The context tower's part of a plan."""
        logits_indices = None
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
        attention = self._context_attention(step, context)
        input_ids = self._text[context.slots[context.row], context.positions]
        prompt_tokens = self._prompt_tokens(step, context.host)
        plan.context = ContextInputs(attention, context, input_ids, logits_indices, prompt_tokens)

    def _plan_drafts(self, plan: PassPlan, step: Step, drafts: DeviceRows) -> None:
        """The context tower's read of blocks that it is to verify; its Mamba states stay as they are."""
        groups = [
            [] if group_id in self._mamba_groups else layers for group_id, layers in enumerate(step.context_groups)
        ]
        # A page more, as drafts that are filled up may reach beyond the last one.
        tables = [F.pad(table, (0, 1), value=NULL_BLOCK_ID) for table in drafts.block_tables(self._block_tables)]
        attention = self._attention(drafts, tables, groups, is_causal=True)
        states = self._state_indices(drafts.starts + drafts.lengths, tables)
        is_inert = drafts.is_inert if drafts.has_padding else None
        attention.metadata |= {name: UncommittedRead(len(drafts), index, is_inert) for name, index in states.items()}
        input_ids = self._text[drafts.slots[drafts.row], drafts.positions].long()
        plan.drafts = ContextInputs(attention, drafts, input_ids, slice(None), None)
        of_row = input_ids.view(len(drafts), drafts.width)
        plan.drafted = DraftedTokens(drafts.behind_each_token(), self.table, of_row)

    def _begin_drafts(self, rows: StepRows, denoiser: DeviceRows) -> None:
        """Puts the newest token at the start of canvases that are drafts, before their first pass."""
        batch_rows = denoiser.host.batch_rows
        begins = np.flatnonzero(rows.is_verified[batch_rows] & (rows.denoiser_passes[batch_rows] == 1))
        if len(begins):
            drafts = denoiser.take(begins)
            self.table.canvas[drafts.slots, 0] = self._text[drafts.slots, drafts.starts].long()

    def advance_states(self, plan: PassPlan, counts: Tensor) -> None:
        """Lets Mamba states go on by the first ``counts`` (n,) tokens of the drafts that the pass has verified."""
        counts = F.pad(counts, (0, len(plan.drafts.rows) - len(counts)))
        for name in self._mamba_layers:
            self._layers[name].commit(plan.drafts.attention.metadata[name], counts)

    def _context_attention(self, step: Step, rows: DeviceRows) -> AttentionInputs:
        """What the context tower's layers need; for Mamba layers as in the pass before if that was the same to them."""
        groups, kept = step.context_groups, {}
        before = None if step.plan is None else step.plan.context
        if before is not None and self._continues(before.rows, rows):
            groups = [[] if group_id in self._mamba_groups else groups[group_id] for group_id in range(len(groups))]
            kept = {name: before.attention.metadata[name] for name in self._mamba_layers}
        attention = self._attention(rows, rows.block_tables(self._block_tables), groups, is_causal=True)
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
            ends, seq_lens = host.ends, (rows.starts + rows.width).masked_fill(rows.lengths == 0, 0)
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
        return AttentionInputs(metadata, slot_mapping)
