"""The model state that vLLM's runner asks what to run: plans each step's rows for the two towers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower.model.denoiser import DENOISER_PREFIX, CanvasRows
from vllm_twotower.model.step_logits import StepLogits
from vllm_twotower.options import EngineOptions

from .pass_buffers import DeviceRows, PassBuffers
from .pass_plan import AttentionInputs, CanvasInputs, ContextInputs, PassPlan
from .prefix_cache import commit_interval, move_states, state_block_size, state_column
from .request_table import RequestTable
from .sampler import TwoTowerSampler
from .step_rows import StepRows
from .targets import Canvases, NextTokens
from .tower_rows import TowerRows


class TwoTowerModelState(ModelState):
    """Turns vLLM's batch into :class:`StepRows` in every step, and these into the passes of the towers."""

    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = EngineOptions.of(self.model_config)
        vocab_size = self.model_config.get_vocab_size()
        self.table = RequestTable(self.max_num_reqs, self.max_model_len, self.options, vocab_size, device)
        self._buffers = PassBuffers(self.max_num_reqs, device)
        self._step: _Step | None = None

    def custom_sampler(self, sampler: Sampler) -> tuple[TwoTowerSampler, None]:
        self._req_states = sampler.req_states
        return TwoTowerSampler(sampler, self, self.model_config), None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Notes which block table each Mamba layer's states are in, and the page sizes."""
        self._kv_cache_config, self._block_sizes = kv_cache_config, block_tables.block_sizes
        # Those of the rows of vLLM's batch, which it fills before every step.
        self._block_tables = block_tables.input_block_tables
        self._state_block_size = state_block_size(kv_cache_config, self.max_model_len)
        self._commit_interval = commit_interval(kv_cache_config, self.max_model_len)
        groups = enumerate(kv_cache_config.kv_cache_groups)
        self._mamba_groups = {group_id for group_id, group in groups if isinstance(group.kv_cache_spec, MambaSpec)}
        self._mamba_layers = {
            layer_name: group_id
            for group_id in self._mamba_groups
            for layer_name in kv_cache_config.kv_cache_groups[group_id].layer_names
        }

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        self.table.add(req_index, new_req_data.req_id, new_req_data.sampling_params)

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: dict, input_batch: InputBatch, req_states: RequestState):
        return None

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The first pass of the step; none while memory is profiled."""
        return {"plan": None if self._step is None else self._step.plan}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Plans the step and its first pass, each tower's attention metadata on its own rows; keyed by layer name."""
        num_reqs = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:num_reqs]
        drafts = input_batch.num_draft_tokens_per_req
        rows = StepRows(
            slots,
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.num_scheduled_tokens[:num_reqs],
            np.zeros_like(slots) if drafts is None else drafts[:num_reqs],
            input_batch.prefill_len_np[:num_reqs],
            self._req_states.max_seq_len[slots],
            self.table,
            self._commit_interval,
            self._state_block_size,
        )
        towers = [
            [[group for group in groups if _is_denoiser(group) == of_denoiser] for groups in attn_groups]
            for of_denoiser in (False, True)
        ]
        self._step = _Step(
            rows,
            input_batch.query_start_loc_np[:num_reqs],
            input_batch.prefill_len_np[:num_reqs],
            *towers,
        )
        return self._plan_pass(self._step).attention.metadata

    def take_step(self) -> tuple[StepRows, PassPlan] | None:
        """The rows of this step and its first pass, once; None while memory is profiled."""
        if self._step is None:
            return None
        self._current, self._step = self._step, None
        return self._current.rows, self._current.plan

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """Runs the next pass of the step that was taken."""
        plan = self._plan_pass(self._current)
        attention = plan.attention
        with set_forward_context(
            attention.metadata,
            self.vllm_config,
            num_tokens=plan.num_tokens,
            slot_mapping=attention.slot_mapping,
        ):
            return plan, self.model.run(plan)

    def _plan_pass(self, step: _Step) -> PassPlan:
        """The next pass, on what the rows need now."""
        context, gets_token = step.rows.take_context()
        self._move_states(context)
        sent = self._buffers.send(step.rows.slots, context, step.rows.take_canvases())
        step.plan = self.plan_towers(step, *sent, gets_token)
        return step.plan

    def plan_towers(self, step: _Step, context: DeviceRows, denoiser: DeviceRows, gets_token: np.ndarray) -> PassPlan:
        """The inputs of both towers, made on the device of what was sent there.

        ``gets_token``: which of the context tower's rows get a next token.
        """
        plan = PassPlan()
        if len(context):
            self._plan_context(plan, step, context, gets_token)
        if len(denoiser):
            plan.canvases = canvases = Canvases(denoiser, self.table)
            tokens, times = canvases.canvas.flatten(), canvases.times()
            before = step.plan
            if before is not None and before.canvases is not None and before.canvases.has_rows_of(canvases):
                plan.canvas = replace(before.canvas, input_ids=tokens, time=times)
            else:
                tables = denoiser.block_tables(self._block_tables)
                attention = self._attention(denoiser, tables, step.denoiser_groups, is_causal=False)
                rows = CanvasRows(len(denoiser), denoiser.width, self._state_indices(denoiser, tables))
                plan.canvas = CanvasInputs(attention, tokens, rows, times)
        return plan

    def _plan_context(self, plan: PassPlan, step: _Step, context: DeviceRows, gets_token: np.ndarray) -> None:
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
        input_ids = self._req_states.all_token_ids.gpu[context.slots[context.row], context.positions]
        prompt_tokens = self._prompt_tokens(step, context.host)
        plan.context = ContextInputs(attention, context, input_ids, logits_indices, prompt_tokens)

    def _context_attention(self, step: _Step, rows: DeviceRows) -> AttentionInputs:
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
        first, second = (state_column(ends, self._state_block_size) for ends in (before.host.ends, rows.host.ends))
        is_same = (before.host.batch_rows == rows.host.batch_rows) & (first == second)
        return bool((is_same & (before.host.starts > 0)).all())

    def _prompt_tokens(self, step: _Step, rows: TowerRows) -> torch.Tensor | None:
        """See :class:`ContextInputs`; a chunk is read in the first pass of a step."""
        batch_rows = rows.batch_rows
        scored = self.table.scores_prompt[step.rows.slots[batch_rows]] & (rows.starts < step.prefill_len[batch_rows])
        if not scored.any():
            return None
        row = np.repeat(np.arange(len(rows)), rows.lengths)
        chosen = np.flatnonzero(scored[row])
        in_batch = (step.query_start[batch_rows] - rows.query_start_loc[:-1])[row] + np.arange(len(row))
        return async_tensor_h2d(np.stack((chosen, in_batch[chosen])), device=self.device)

    def _move_states(self, rows: TowerRows) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        move_states(
            rows,
            self._state_block_size,
            ((self._block_tables[group], layers[name].kv_cache) for name, group in self._mamba_layers.items()),
        )

    def _state_indices(self, rows: DeviceRows, block_tables: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The slot (n,) of the state before each row, by context layer."""
        columns = state_column(rows.starts, self._state_block_size)[:, None]
        of_group = {group: block_tables[group].gather(1, columns)[:, 0] for group in self._mamba_groups}
        return {name: of_group[group] for name, group in self._mamba_layers.items()}

    def _attention(
        self, rows: DeviceRows, block_tables: list[torch.Tensor], groups: list[list[AttentionGroup]], is_causal: bool
    ) -> AttentionInputs:
        """What one tower's layers need beside hidden states."""
        slot_mapping: dict[str, torch.Tensor] = {}
        slot_mappings: list[torch.Tensor | None] = [None] * len(groups)
        for group_id, layers in enumerate(groups):
            if layers and group_id not in self._mamba_groups:
                slot_mappings[group_id] = rows.slot_mapping(block_tables[group_id], self._block_sizes[group_id])
                for group in layers:
                    slot_mapping.update(dict.fromkeys(group.layer_names, slot_mappings[group_id]))
        host = rows.host if rows.width is None else rows.host.widened(rows.width)
        ends = torch.from_numpy(rows.host.ends.astype(np.int32))
        metadata = build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(rows),
            num_tokens=rows.num_tokens,
            query_start_loc_gpu=rows.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(host.query_start_loc.astype(np.int32)),
            max_query_len=int(host.lengths.max()),
            seq_lens=(rows.starts + rows.lengths).int(),
            max_seq_len=int(rows.host.ends.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=ends,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            causal=is_causal,
        )
        return AttentionInputs(metadata, slot_mapping)


@dataclass
class _Step:
    """A step's rows and what its passes need of vLLM's batch, by its rows (R,); and the pass planned last."""

    rows: StepRows
    query_start: np.ndarray
    prefill_len: np.ndarray
    context_groups: list[list[AttentionGroup]]
    denoiser_groups: list[list[AttentionGroup]]
    plan: PassPlan | None = None


def _is_denoiser(group: AttentionGroup) -> bool:
    return DENOISER_PREFIX in group.layer_names[0]
