"""The model state that vLLM's runner asks what to run: plans each step's rows for the two towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
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

from .blocks import Blocks
from .prefix_cache import commit_interval, move_states, state_block_size, state_column
from .request_table import RequestTable
from .sampler import TwoTowerSampler
from .staging import Staging
from .step_plan import CanvasInputs, StepPlan, canvas_rows, context_inputs, page_slots, split_rows
from .tower_rows import TowerRows


class TwoTowerModelState(ModelState):
    """Keeps the requests' canvases and turns vLLM's batch into a :class:`StepPlan` in every step."""

    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = EngineOptions.of(self.model_config)
        self.table = RequestTable(self.max_num_reqs, self.options, self.model_config.get_vocab_size(), device)
        self.staging = Staging(device)
        self._plan: StepPlan | None = None

    def custom_sampler(self, sampler: Sampler) -> tuple[TwoTowerSampler, None]:
        return TwoTowerSampler(sampler, self, self.model_config), None

    def take_plan(self) -> StepPlan | None:
        """The plan of this step, once; none while memory is profiled."""
        plan, self._plan = self._plan, None
        return plan

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Notes which block table each Mamba layer's states are in, and the page sizes."""
        self._block_sizes = block_tables.block_sizes
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
        """The plan that :meth:`prepare_attn` made for this step; none while memory is profiled."""
        return {"plan": self._plan}

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
        """Plans the step and builds each tower's attention metadata on its own rows; keyed by layer name."""
        num_reqs, table, staging = input_batch.num_reqs, self.table, self.staging
        slots = input_batch.idx_mapping_np[:num_reqs]
        query_start = input_batch.query_start_loc_np[:num_reqs]
        staging.begin()
        split = split_rows(
            slots,
            input_batch.num_scheduled_tokens[:num_reqs],
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.prefill_len_np[:num_reqs],
            query_start,
            table,
            self.max_model_len,
            self._commit_interval,
        )
        input_ids = input_batch.input_ids[: input_batch.num_tokens]
        blocks = Blocks(split.blocks, slots[split.blocks.batch_rows], table, staging) if len(split.blocks) else None
        context = context_inputs(split, table, slots, query_start, input_ids, staging)
        self._plan = plan = StepPlan(split, context, None, blocks)
        metadata: dict[str, Any] = {}
        if len(split.context):
            groups = [[group for group in groups if not _is_denoiser(group)] for groups in attn_groups]
            tables = self._rows_of(block_tables, split.context, num_reqs)
            self._move_states(split.context, tables)
            metadata |= self._tower_metadata(split.context, tables, groups, kv_cache_config, plan.slot_mapping)
        if blocks is not None:
            self._denoiser = _Denoiser(
                [[group for group in groups if _is_denoiser(group)] for groups in attn_groups],
                kv_cache_config,
                block_tables,
                num_reqs,
            )
            rows = self._prepare_denoiser(split.blocks)
            plan.canvas = CanvasInputs(blocks.input_ids, rows, blocks.times(table.strategies))
            plan.slot_mapping |= self._denoiser.slot_mapping
            metadata |= self._denoiser.metadata
        return metadata

    def denoise_again(self, blocks: Blocks, changed: bool) -> torch.Tensor:
        """Another pass over canvases in the same step; ``changed`` if they are not all the rows of the pass before.

        Returns hidden states (T, H).
        """
        if changed:
            self._prepare_denoiser(blocks.rows)
        step = self._denoiser
        with set_forward_context(
            step.metadata, self.vllm_config, num_tokens=blocks.rows.num_tokens, slot_mapping=step.slot_mapping
        ):
            return self.model.denoise(blocks.input_ids, step.rows, blocks.times(self.table.strategies))

    def _prepare_denoiser(self, rows: TowerRows) -> CanvasRows:
        """The denoiser's metadata for rows of this step, kept until they change."""
        step = self._denoiser
        tables = self._rows_of(step.block_tables, rows, step.num_reqs)
        state_indices = self._state_indices(rows, tables)
        step.rows = canvas_rows(rows, state_indices, self.staging)
        step.slot_mapping = {}
        step.metadata = self._tower_metadata(rows, tables, step.groups, step.kv_cache_config, step.slot_mapping)
        return step.rows

    def _rows_of(self, block_tables: Sequence[torch.Tensor], rows: TowerRows, num_reqs: int) -> list[torch.Tensor]:
        """The block tables' rows that belong to a tower's; ``num_reqs`` is the number of vLLM's rows."""
        if len(rows) == num_reqs and (rows.batch_rows == np.arange(num_reqs)).all():
            return [table[:num_reqs] for table in block_tables]
        index = self.staging.put(rows.batch_rows)
        self.staging.send()
        return [table[index] for table in block_tables]

    def _move_states(self, rows: TowerRows, block_tables: list[torch.Tensor]) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        move_states(
            rows.starts,
            rows.seq_lens,
            self._state_block_size,
            ((block_tables[group], layers[name].kv_cache) for name, group in self._mamba_layers.items()),
        )

    def _state_indices(self, rows: TowerRows, block_tables: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The slot (rows,) of the state before each row, by context layer."""
        columns = self.staging.put(state_column(rows.starts, self._state_block_size))
        self.staging.send()
        of_group = {group: block_tables[group].gather(1, columns[:, None])[:, 0] for group in self._mamba_groups}
        return {name: of_group[group] for name, group in self._mamba_layers.items()}

    def _tower_metadata(
        self,
        rows: TowerRows,
        block_tables: list[torch.Tensor],
        groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        slot_mapping: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Attention metadata of one tower, by layer name; also notes where its keys and values go."""
        positions = rows.spread(rows.starts)
        slot_mappings: list[torch.Tensor | None] = [None] * len(groups)
        for group_id, layers in enumerate(groups):
            if layers and group_id not in self._mamba_groups:
                slot_mappings[group_id] = page_slots(
                    rows, positions, block_tables[group_id], self._block_sizes[group_id], self.staging
                )
                for group in layers:
                    slot_mapping.update(dict.fromkeys(group.layer_names, slot_mappings[group_id]))
        query_start_loc = torch.from_numpy(rows.query_start_loc)
        seq_lens = torch.from_numpy(rows.seq_lens.astype(np.int32))
        return build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(rows),
            num_tokens=rows.num_tokens,
            query_start_loc_gpu=query_start_loc.to(self.device, non_blocking=True),
            query_start_loc_cpu=query_start_loc,
            max_query_len=int(rows.lengths.max()),
            seq_lens=seq_lens.to(self.device, non_blocking=True),
            max_seq_len=int(seq_lens.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            causal=not any(_is_denoiser(group) for layers in groups for group in layers),
        )


@dataclass
class _Denoiser:
    """What further passes of a step need: the denoiser's part of vLLM's structures, and its rows and metadata."""

    groups: list[list[AttentionGroup]]
    kv_cache_config: KVCacheConfig
    block_tables: Sequence[torch.Tensor]
    num_reqs: int
    rows: CanvasRows | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)


def _is_denoiser(group: AttentionGroup) -> bool:
    return DENOISER_PREFIX in group.layer_names[0]
