"""The model state that vLLM's runner asks what to run: the face of a step's passes towards vLLM."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower.model.step_logits import StepLogits
from vllm_twotower.options import EngineOptions

from .captured_passes import CapturedPasses
from .graph_choice import GraphChoice
from .pass_graphs import PassGraphs
from .pass_plan import ContextInputs, PassPlan
from .pass_planner import PassPlanner, Step, TowerGroups
from .prefix_cache import commit_interval
from .request_table import RequestTable
from .sampler import TwoTowerSampler
from .step_rows import StepRows


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
        self._step: Step | None = None
        self._graphs: Callable[[], PassGraphs | None] = lambda: None

    def custom_sampler(self, sampler: Sampler) -> tuple[TwoTowerSampler, None]:
        self._req_states = sampler.req_states
        self._sampler = TwoTowerSampler(sampler, self, self.model_config)
        return self._sampler, None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Notes the pages of the KV cache."""
        layers = self.vllm_config.compilation_config.static_forward_context
        text = self._req_states.all_token_ids.gpu
        self.planner = PassPlanner(self.table, text, kv_cache_config, block_tables, layers)
        self._commit_interval = commit_interval(kv_cache_config, self.max_model_len)

    def capturable_passes(self, attn_groups: list[list[AttentionGroup]]) -> CapturedPasses:
        """The passes that can be captured as CUDA graphs, on the KV cache that there is now."""
        groups = TowerGroups(attn_groups)
        return CapturedPasses(self.planner, self.model, self._sampler.pass_decision, groups, self.vllm_config)

    def use_graphs(self, graphs: PassGraphs) -> None:
        """Replays passes for as long as vLLM's runner keeps the graphs."""
        self._graphs = weakref.ref(graphs)

    def _choice(self) -> GraphChoice | None:
        graphs = self._graphs()
        return None if graphs is None else GraphChoice(graphs, self.table, self._sampler.needs_logits)

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
            self.planner.state_block_size,
        )
        self._step = Step(
            rows,
            input_batch.query_start_loc_np[:num_reqs],
            input_batch.prefill_len_np[:num_reqs],
            TowerGroups(attn_groups),
        )
        self.planner.plan(self._step, self._choice())
        return {}  # each run of a tower has its own, see PassPlan

    def take_step(self) -> tuple[StepRows, PassPlan] | None:
        """The rows of this step and its first pass, once; None while memory is profiled."""
        if self._step is None:
            return None
        self._current, self._step = self._step, None
        assert self._current.plan is not None
        return self._current.rows, self._current.plan

    def run_pass(self) -> tuple[PassPlan, StepLogits]:
        """Runs the next pass of the step that was taken."""
        plan = self.planner.plan(self._current, self._choice())
        with set_forward_context({}, self.vllm_config, num_tokens=plan.num_tokens):
            return plan, self.model.run(plan)

    def commit_drafts(self, plan: PassPlan, counts: np.ndarray) -> None:
        """Lets the context tower's states go on by so many tokens (n,) of the drafts that the pass has verified."""
        assert isinstance(plan.drafts, ContextInputs)
        self.planner.advance_states(plan.drafts, plan.drafts.rows.on_device(counts))
