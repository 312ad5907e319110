"""The model state that vLLM's runner asks what to run: plans each step's rows for the two towers."""

from __future__ import annotations

from dataclasses import dataclass, field
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

from vllm_twotower.config import EngineOptions
from vllm_twotower.model.denoiser import DENOISER_PREFIX, CanvasRows
from vllm_twotower.model.step_logits import StepLogits

from .pass_buffers import DeviceRows, PassBuffers
from .pass_plan import CanvasInputs, ContextInputs, PassPlan
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
            [table[:num_reqs] for table in block_tables],
            *towers,
        )
        return self._plan_pass(self._step).metadata

    def take_step(self) -> tuple[StepRows, PassPlan] | None:
        """The rows of this step and its first pass, once; None while memory is profiled."""
        if self._step is None:
            return None
        self._current, self._step = self._step, None
        return self._current.rows, self._current.plan

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """Runs the next pass of the step that was taken."""
        plan = self._plan_pass(self._current)
        num_tokens = sum(len(part.input_ids) for part in (plan.context, plan.canvas) if part is not None)
        with set_forward_context(
            plan.metadata, self.vllm_config, num_tokens=num_tokens, slot_mapping=plan.slot_mapping
        ):
            return plan, self.model.run(plan)

    def _plan_pass(self, step: _Step) -> PassPlan:
        """The next pass, on what the rows need now; the denoiser's part as before if its rows are the same."""
        context_rows, gets_token = step.rows.take_context()
        canvas_rows = step.rows.take_canvases()
        context, denoiser = self._buffers.send(step.rows.slots, context_rows, canvas_rows)
        before, step.plan = step.plan, PassPlan()
        if len(context):
            self._plan_context(step, context, gets_token)
        if not len(denoiser):
            return step.plan
        is_same = (
            before is not None
            and before.canvases is not None
            and np.array_equal(before.canvases.rows.batch_rows, canvas_rows.batch_rows)
        )
        if is_same:
            step.plan.canvases = before.canvases
            step.plan.canvases.load()
            rows = before.canvas.rows
        else:
            step.plan.canvases = Canvases(canvas_rows, denoiser.host_slots, denoiser.slots, denoiser.starts, self.table)
            rows = self._plan_denoiser(step, denoiser)
        step.plan.metadata |= step.denoiser_metadata
        step.plan.slot_mapping |= step.denoiser_slot_mapping
        canvases = step.plan.canvases
        step.plan.canvas = CanvasInputs(canvases.input_ids, rows, canvases.times())
        return step.plan

    def _plan_context(self, step: _Step, context: DeviceRows, gets_token: np.ndarray) -> None:
        """The context tower's part of the step's plan."""
        plan, rows, tables = step.plan, context.host, step.tables_of(context)
        self._move_states(rows, tables)
        row, positions = context.row, context.positions
        input_ids = self._req_states.all_token_ids.gpu[context.slots[row], positions]
        logits_indices = None
        if gets_token.any():
            index = np.flatnonzero(gets_token)
            logits_indices, of_index = (
                async_tensor_h2d(values, device=self.device) for values in (rows.query_start_loc[1:][index] - 1, index)
            )
            batch_rows = rows.batch_rows[index]
            ends = TowerRows(batch_rows, rows.ends[index], np.ones_like(index))
            plan.next_tokens = NextTokens(
                ends,
                context.host_slots[index],
                context.slots[of_index],
                (context.starts + context.lengths)[of_index],
                self.table,
            )
            plan.next_tokens.num_returned = step.rows.num_new[batch_rows]
        plan.context = ContextInputs(input_ids, positions, logits_indices, self._prompt_tokens(step, rows))
        plan.metadata |= self._metadata(context, tables, step.context_groups, plan.slot_mapping, is_causal=True)

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

    def _plan_denoiser(self, step: _Step, denoiser: DeviceRows) -> CanvasRows:
        """The denoiser's metadata for its rows, kept in the step until they change; and how they lie."""
        tables = step.tables_of(denoiser)
        step.denoiser_slot_mapping = {}
        step.denoiser_metadata = self._metadata(
            denoiser, tables, step.denoiser_groups, step.denoiser_slot_mapping, is_causal=False
        )
        return denoiser.canvas_rows(self._state_indices(denoiser, tables))

    def _move_states(self, rows: TowerRows, block_tables: list[torch.Tensor]) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        move_states(
            rows.starts,
            rows.ends,
            self._state_block_size,
            ((block_tables[group], layers[name].kv_cache) for name, group in self._mamba_layers.items()),
        )

    def _state_indices(self, rows: DeviceRows, block_tables: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The slot (n,) of the state before each row, by context layer."""
        columns = state_column(rows.starts, self._state_block_size)[:, None]
        of_group = {group: block_tables[group].gather(1, columns)[:, 0] for group in self._mamba_groups}
        return {name: of_group[group] for name, group in self._mamba_layers.items()}

    def _metadata(
        self,
        rows: DeviceRows,
        block_tables: list[torch.Tensor],
        groups: list[list[AttentionGroup]],
        slot_mapping: dict[str, torch.Tensor],
        is_causal: bool,
    ) -> dict[str, Any]:
        """Attention metadata of one tower, by layer name; also notes where its keys and values go."""
        slot_mappings: list[torch.Tensor | None] = [None] * len(groups)
        for group_id, layers in enumerate(groups):
            if layers and group_id not in self._mamba_groups:
                block_size = self._block_sizes[group_id]
                pages = block_tables[group_id][rows.row, rows.positions // block_size]
                slot_mappings[group_id] = pages.long() * block_size + rows.positions % block_size
                for group in layers:
                    slot_mapping.update(dict.fromkeys(group.layer_names, slot_mappings[group_id]))
        ends = torch.from_numpy(rows.host.ends.astype(np.int32))
        return build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(rows),
            num_tokens=rows.host.num_tokens,
            query_start_loc_gpu=rows.query_start_loc.int(),
            query_start_loc_cpu=torch.from_numpy(rows.host.query_start_loc.astype(np.int32)),
            max_query_len=int(rows.host.lengths.max()),
            seq_lens=(rows.starts + rows.lengths).int(),
            max_seq_len=int(ends.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=ends,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            causal=is_causal,
        )


@dataclass
class _Step:
    """A step's rows and what its passes need of vLLM's batch, by its rows (R,); and the pass planned last."""

    rows: StepRows
    query_start: np.ndarray
    prefill_len: np.ndarray
    block_tables: list[torch.Tensor]
    context_groups: list[list[AttentionGroup]]
    denoiser_groups: list[list[AttentionGroup]]
    plan: PassPlan | None = None
    denoiser_metadata: dict[str, Any] = field(default_factory=dict)
    denoiser_slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)

    def tables_of(self, rows: DeviceRows) -> list[torch.Tensor]:
        """The block tables' rows that belong to a tower's."""
        if np.array_equal(rows.host.batch_rows, np.arange(len(self.rows))):
            return self.block_tables
        return [table[rows.batch_rows] for table in self.block_tables]


def _is_denoiser(group: AttentionGroup) -> bool:
    return DENOISER_PREFIX in group.layer_names[0]
