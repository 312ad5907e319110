"""vLLM's scheduler of diffusion requests, taught what a TwoTower's rows cost and when its requests return something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_twotower.config import EngineOptions, RequestOptions

from .metrics import RequestDenoisingMetrics, StepCosts
from .prefix_cache import FoundPages, check_page_size, commit_interval, next_stop


@dataclass
class RowState:
    """What decides which towers run a request's row: the worker has the same, from the same events.

    The first ``prefill_len`` tokens are read as a prompt, after a preemption also those generated before. The block
    that is being filled had ``num_passes`` denoiser passes. ``unread`` of the returned tokens the context tower has yet
    to read.
    """

    options: RequestOptions
    prefill_len: int
    num_passes: int = 0
    unread: int = 0


class TwoTowerScheduler(DiffusionScheduler):
    """Schedules canvases as vLLM does, autoregressive requests without drafts, and counts every tower's passes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._engine_options = EngineOptions.of(self.vllm_config.model_config)
        # vLLM's own level must be none without a speculative configuration.
        self.spec_decode_metrics_level = self._engine_options.request_metrics
        self._rows: dict[str, RowState] = {}
        self._costs = StepCosts()
        self._held_logprobs: dict[str, Any] = {}
        self._held_token_id_logprobs: dict[str, Any] = {}
        check_page_size(self.kv_cache_config, self._engine_options.canvas_length)
        self._commit_interval = commit_interval(self.kv_cache_config, self.max_model_len)
        self._found_pages = FoundPages(self.kv_cache_manager, self._unread)

    def add_request(self, request: Request) -> None:
        """Admits a request; vLLM's per-request metrics, where it made some, give way to ours."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            options = RequestOptions.parse(request.sampling_params.extra_args, self._engine_options)
            denoises = options.mode == "mask_diffusion"
            request.spec_decode_metrics = RequestDenoisingMetrics.new(self.num_spec_tokens) if denoises else None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """The canvases of the next step; an autoregressive request has none and goes on by one token a step."""
        for i, req_id in enumerate(draft_token_ids.req_ids):
            if req_id in self._rows and self._rows[req_id].options.mode != "mask_diffusion":
                draft_token_ids.draft_token_ids[i] = []
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, after the step is counted and prompt scores are kept for the first output."""
        starts = self._update_rows(scheduler_output)
        index, sampled = model_runner_output.req_id_to_index, model_runner_output.sampled_token_ids
        num_sampled = {req_id: len(sampled[index[req_id]]) if sampled else 0 for req_id in starts}
        # Also for requests aborted while the step ran: the worker has run their rows.
        for req_id, start in starts.items():
            request = self.requests.get(req_id)
            metrics = None if request is None else request.spec_decode_metrics
            num_scheduled = scheduler_output.num_scheduled_tokens[req_id]
            self._count_row(self._rows[req_id], start, num_scheduled, num_sampled[req_id], metrics)
        self._hold(self._held_logprobs, model_runner_output.prompt_logprobs_dict, num_sampled)
        self._hold(self._held_token_id_logprobs, model_runner_output.prompt_token_id_logprobs_dict, num_sampled)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_rows(self, scheduler_output: SchedulerOutput) -> dict[str, int]:
        """Starts and drops row states when the worker does; returns where each scheduled row's tokens start."""
        for req_id in scheduler_output.finished_req_ids:
            self._rows.pop(req_id, None)
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:  # after a preemption again
            options = RequestOptions.parse(new.sampling_params.extra_args, self._engine_options)
            self._rows[new.req_id] = RowState(options, len(new.prefill_token_ids))
            starts[new.req_id] = new.num_computed_tokens
        return starts

    def _count_row(
        self,
        row: RowState,
        start: int,
        num_scheduled: int,
        num_sampled: int,
        metrics: RequestDenoisingMetrics | None,
    ) -> None:
        """Counts what the worker did with a row of tokens from ``start`` on; see ``step_plan.split_rows``."""
        costs, options, lazy_commit = self._costs, row.options, self._engine_options.commit == "lazy"
        if start < row.prefill_len or options.mode != "mask_diffusion":
            # In mock_ar the newest token is the denoiser's: a last chunk of one token leaves the context tower nothing.
            costs.context_passes += not (options.mode == "mock_ar" and start == row.prefill_len - 1)
            return
        if num_scheduled < min(options.canvas_length, self.max_model_len - start):
            return  # scheduled in part
        if row.unread:
            costs.context_passes += 1
            row.unread = max(0, start - next_stop(start - row.unread, self._commit_interval))
            if row.unread:
                return
        if num_sampled and not lazy_commit:
            costs.context_passes += 1
        else:
            costs.denoiser_passes += 1
            costs.canvas_positions += num_scheduled
            row.num_passes += 1
            if metrics is not None:
                metrics.add_pass(num_scheduled, self.spec_decode_metrics_level == "detailed")
        if num_sampled:
            costs.committed_tokens += num_sampled
            costs.steps_per_block.append(row.num_passes)
            costs.forced_blocks += row.num_passes >= options.max_steps
            row.num_passes = 0
            if metrics is not None:
                metrics.finish_block(num_sampled)
            end = start + num_sampled
            row.unread = num_sampled if lazy_commit else max(0, end - next_stop(start, self._commit_interval))

    def _unread(self, request: Request) -> int:
        """How many of the tokens that vLLM counts as computed the context tower reads in a later step."""
        row = self._rows.get(request.request_id)
        if request.num_computed_tokens == 0 or row is None:  # new or preempted
            options = RequestOptions.parse(request.sampling_params.extra_args, self._engine_options)
            return options.mode == "mock_ar"
        return 1 if row.options.mode == "mock_ar" else row.unread

    def _free_request_blocks(self, request: Request) -> None:
        self._found_pages.cache(request)
        super()._free_request_blocks(request)

    def _hold(self, held: dict[str, Any], returned: dict[str, Any], num_sampled: dict[str, int]) -> None:
        """Takes from ``returned`` what vLLM could not send yet, and puts back what goes with a first output."""
        for req_id, count in num_sampled.items():
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue  # nobody waits for it
            if count and req_id in held:
                returned[req_id] = held.pop(req_id)
            elif not count and req_id in returned:
                held[req_id] = returned.pop(req_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict | None, dict | None]:
        self._held_logprobs.pop(request.request_id, None)
        self._held_token_id_logprobs.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: vLLM would count every scheduled canvas. See :meth:`make_stats`."""

    def make_stats(
        self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        """vLLM's statistics with the costs of this step, whether the denoiser ran in it or not."""
        costs, self._costs = self._costs, StepCosts()
        return super().make_stats(costs.pack(self.num_spec_tokens), *args, **kwargs)
