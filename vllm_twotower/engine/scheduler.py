"""vLLM's scheduler of diffusion requests, taught what a TwoTower's rows cost and when its requests return something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_twotower.options import EngineOptions, RequestOptions

from .held_scores import HeldPromptScores
from .metrics import RequestDenoisingMetrics, StepCosts
from .mode_control import ModeControl
from .prefix_cache import FoundPages, check_page_size
from .processes import end_engine_with_its_parent
from .report import Report
from .rows import Row, reports

logger = init_logger(__name__)

NOT_FINITE = "the model's logits are not finite (NaN or infinite)"
"""The stop reason of a request that ends because of it."""
_FAILED = RequestStatus.FINISHED_ERROR


class TwoTowerScheduler(DiffusionScheduler):
    """Schedules canvases whole and before prompts, the context tower's blocks by one draft, and counts passes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        end_engine_with_its_parent()
        self._engine_options = options = EngineOptions.of(self.vllm_config.model_config)
        # vLLM's own level must be none without a speculative configuration.
        self.spec_decode_metrics_level = options.request_metrics
        # Room for the first block, which is filled in the prompt's last step, and for what the context tower fills.
        self.num_lookahead_tokens = options.canvas_length
        self._step_budget = self.max_num_scheduled_tokens
        self._rows: dict[str, Row] = {}
        self._mode_control: ModeControl | None = None  # as long as no request leaves the mode to it
        self._costs = StepCosts()
        self._held_scores = HeldPromptScores()
        check_page_size(self.kv_cache_config, options.canvas_length)
        self._found_pages = FoundPages(self.kv_cache_manager, self._unread)

    def add_request(self, request: Request) -> None:
        """Admits a request; vLLM's per-request metrics, where it made some, give way to ours."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            options = RequestOptions.of(request.sampling_params, self._engine_options)
            request.spec_decode_metrics = (
                RequestDenoisingMetrics.new(self.num_spec_tokens) if options.fills_blocks else None
            )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's schedule, in which blocks come first, and prompts beside them get a share of the step."""
        if self._mode_control is not None:
            self._mode_control.step_starts()
        self.running.sort(key=lambda request: request.is_prefill_chunk)
        self.max_num_scheduled_tokens = self._step_budget
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        if any(len(request.spec_token_ids) > 1 for request in decoding):
            decodes = sum(request.num_tokens_with_spec - request.num_computed_tokens for request in decoding)
            # Of all requests, not only of those that decode: else few blocks would let few prompts become blocks.
            num_requests = min(len(self.running) + len(self.waiting), self.max_num_running_reqs)
            beside = max(decodes * num_requests // len(decoding), self._engine_options.prompt_tokens_beside_blocks)
            self.max_num_scheduled_tokens = min(self._step_budget, decodes + beside)
        output = super().schedule(*args, **kwargs)
        for req_id in output.finished_req_ids:
            self._rows.pop(req_id, None)
        for new in output.scheduled_new_reqs:  # after a preemption again
            row = self._rows[new.req_id] = Row.of(new, self._engine_options)
            if row.options.mode == "auto":
                self._choose(row)
                new.sampling_params = row.first_params(new.sampling_params)
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """What the next step schedules of each request beyond the tokens it has, see :meth:`Row.drafts`."""
        for i, req_id in enumerate(draft_token_ids.req_ids):
            if (row := self._rows.get(req_id)) is not None:
                draft_token_ids.draft_token_ids[i] = row.drafts(draft_token_ids.draft_token_ids[i])
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, after the step is counted and prompt scores are kept for the first output."""
        of_rows = reports(model_runner_output)
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        # Also for requests aborted while the step ran: the worker has run their rows.
        for req_id, (report, num_sampled) in of_rows.items():
            request = self.requests.get(req_id)
            metrics = None if request is None else request.spec_decode_metrics
            detailed = self.spec_decode_metrics_level == "detailed"
            self._rows[req_id].count(report, num_sampled, self._costs, metrics, detailed)
        self._measure(of_rows, starts)
        num_sampled = {req_id: sampled for req_id, (_, sampled) in of_rows.items()}
        self._held_scores.exchange(model_runner_output, num_sampled, self._is_waiting)
        for req_id, sampled in num_sampled.items():
            row, request = self._rows[req_id], self.requests.get(req_id)
            if request is None or not sampled:
                continue
            if starts[req_id] < row.prefill_len and not row.has_grammar:
                # What the prompt's last step returns lies in pages beyond those it had scheduled.
                request.num_computed_tokens += sampled
            if row.options.mode == "auto":
                self._choose(row)
        failed = self.finish_requests(
            [req_id for req_id, (report, _) in of_rows.items() if not report.is_finite], _FAILED
        )
        self._costs.not_finite += len(failed)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            logger.error("Request %s ended: %s.", request.request_id, NOT_FINITE)
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=NOT_FINITE)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _unread(self, request: Request) -> int:
        """How many of the tokens that vLLM counts as computed the context tower reads in a later step."""
        row = self._rows.get(request.request_id)
        is_new = request.num_computed_tokens == 0 or row is None  # or preempted
        return 0 if is_new else row.unread

    def _mamba_block_aligned_split(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> int:
        # Without room for a whole page a prompt would wait until the blocks beside it are finished.
        return super()._mamba_block_aligned_split(request, num_new_tokens, *args, **kwargs) or num_new_tokens

    def _free_request_blocks(self, request: Request) -> None:
        if request.status == _FAILED:
            self._found_pages.forget(request)
        else:
            self._found_pages.cache(request)
        super()._free_request_blocks(request)

    def _choose(self, row: Row) -> None:
        """Sets how an ``auto`` request goes on, and counts it."""
        if self._mode_control is None:
            self._mode_control = ModeControl(self._engine_options.canvas_length)
        decision = self._mode_control.choose(self.current_step, len(self.running))
        row.is_ar = decision.mode == "ar"
        self._costs.auto_ar += row.is_ar
        self._costs.auto_diffusion += not row.is_ar
        self._costs.auto_changes += self._mode_control.take_changes()
        self._costs.auto_ar_us = round(decision.ar_seconds * 1e6)
        self._costs.auto_diffusion_us = round(decision.diffusion_seconds * 1e6)

    def _measure(self, of_rows: Mapping[str, tuple[Report, int]], starts: Mapping[str, int]) -> None:
        """Lets the choice of modes learn from a step that read no prompt."""
        if self._mode_control is None or any(starts[name] < self._rows[name].prefill_len for name in of_rows):
            return
        num_ar = sum(self._rows[name].is_ar for name in of_rows)
        num_tokens = sum(sampled for _, sampled in of_rows.values())
        self._mode_control.step_ends(num_ar, len(of_rows) - num_ar, num_tokens)

    def _is_waiting(self, req_id: str) -> bool:
        return req_id in self.requests and not self.requests[req_id].is_finished()

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict | None, dict | None]:
        self._held_scores.drop(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: vLLM would count every scheduled canvas. See :meth:`make_stats`."""

    def make_stats(
        self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        """vLLM's statistics with the costs of this step, whether the denoiser ran in it or not."""
        costs, self._costs = self._costs, StepCosts()
        return super().make_stats(costs.pack(self.num_spec_tokens), *args, **kwargs)
