"""The model state that vLLM's runner asks what to run: plans each step's rows for the two towers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
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
from vllm_twotower.model.denoiser import DENOISER_PREFIX

from .prefix_cache import commit_interval, move_states, state_block_size, state_column
from .request_table import RequestTable
from .sampler import TwoTowerSampler
from .step_plan import StepPlan, TowerRows, block_inputs, canvas_inputs, context_inputs, page_slots, split_rows


class TwoTowerModelState(ModelState):
    """Keeps the requests' canvases and turns vLLM's batch into a :class:`StepPlan` in every step."""

    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = EngineOptions.of(self.model_config)
        self.table = RequestTable(self.max_num_reqs, self.options, self.model_config.get_vocab_size(), device)
        self._plan: StepPlan | None = None

    def custom_sampler(self, sampler: Sampler) -> tuple[TwoTowerSampler, None]:
        return TwoTowerSampler(sampler, self.table, self._take_plan, self.model_config.logprobs_mode), None

    def _take_plan(self) -> StepPlan | None:
        plan, self._plan = self._plan, None
        return plan

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Notes which block table each Mamba layer's states are in, and the page sizes."""
        self._block_sizes = block_tables.block_sizes
        self._state_block_size = state_block_size(kv_cache_config, self.max_model_len)
        self._commit_interval = commit_interval(kv_cache_config, self.max_model_len)
        self._mamba_layers = {
            layer_name: group_id
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, MambaSpec)
            for layer_name in group.layer_names
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
        num_reqs = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:num_reqs]
        query_start = input_batch.query_start_loc_np[:num_reqs]
        split = split_rows(
            slots,
            input_batch.num_scheduled_tokens[:num_reqs],
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.prefill_len_np[:num_reqs],
            query_start,
            self.table,
            self.max_model_len,
            self.options.commit == "lazy",
            self._commit_interval,
        )
        context_tables, canvas_tables = (self._rows_of(block_tables, rows) for rows in (split.context, split.canvas))
        self._move_states(split.context, context_tables)
        state_indices = self._state_indices(split.canvas, canvas_tables)
        input_ids = input_batch.input_ids[: input_batch.num_tokens]
        blocks = block_inputs(split, self.table, slots)
        self._plan = StepPlan(
            split,
            context_inputs(split, self.table, slots, query_start, input_ids),
            canvas_inputs(split, self.table, blocks, input_ids, state_indices),
            blocks,
        )
        metadata: dict[str, Any] = {}
        for rows, tables, of_denoiser in (
            (split.context, context_tables, False),
            (split.canvas, canvas_tables, True),
        ):
            if len(rows):
                groups = [[g for g in groups if _is_denoiser(g) == of_denoiser] for groups in attn_groups]
                metadata.update(self._tower_metadata(rows, tables, groups, kv_cache_config))
        return metadata

    @staticmethod
    def _rows_of(block_tables: tuple[torch.Tensor, ...], rows: TowerRows) -> list[torch.Tensor]:
        index = async_tensor_h2d(rows.batch_rows, device=block_tables[0].device)
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
        columns = async_tensor_h2d(state_column(rows.starts, self._state_block_size), device=self.device)[:, None]
        of_group = {group: block_tables[group].gather(1, columns)[:, 0] for group in set(self._mamba_layers.values())}
        return {name: of_group[group] for name, group in self._mamba_layers.items()}

    def _tower_metadata(
        self,
        rows: TowerRows,
        block_tables: list[torch.Tensor],
        groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, Any]:
        """Attention metadata of one tower, by layer name; also notes where its keys and values go."""
        slot_mappings = page_slots(rows, block_tables, self._block_sizes)
        query_start_loc = torch.from_numpy(rows.query_start_loc)
        seq_lens = torch.from_numpy(rows.seq_lens.astype(np.int32))
        for group_id, layers in enumerate(groups):
            for group in layers:
                self._plan.slot_mapping.update(dict.fromkeys(group.layer_names, slot_mappings[group_id]))
        of_denoiser = any(_is_denoiser(group) for layers in groups for group in layers)
        return build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(rows),
            num_tokens=int(rows.lengths.sum()),
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
            causal=not of_denoiser,
        )


def _is_denoiser(group: AttentionGroup) -> bool:
    return DENOISER_PREFIX in group.layer_names[0]
