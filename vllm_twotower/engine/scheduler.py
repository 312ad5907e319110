"""vLLM's scheduler of diffusion requests, taught what a TwoTower's rows cost and when its requests return something."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
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
from .running_requests import RunningRequest, RunningRequests, answer_failed, reports, send_traces

_FAILED = RequestStatus.FINISHED_ERROR


class TwoTowerScheduler(DiffusionScheduler):
    """Schedules canvases whole and before prompts, the context tower's blocks by one draft, and counts passes."""

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        end_engine_with_its_parent()
        self._engine_options = options = EngineOptions.of(self.vllm_config.model_config)
        # vLLM's own level must be none without a speculative configuration.
        self.spec_decode_metrics_level = options.request_metrics
        # Room for the first block, which is filled in the prompt's last step, and for what the context tower fills.
        self.num_lookahead_tokens = options.canvas_length
        self._step_budget = self.max_num_scheduled_tokens
        self._known = RunningRequests(options)
        self._mode_control = ModeControl(options.canvas_length)
        self._costs = StepCosts()
        self._held_scores = HeldPromptScores()
        check_page_size(self.kv_cache_config, options.canvas_length)
        self._found_pages = FoundPages(self.kv_cache_manager, self._known.unread)

    def add_request(self, request: Request) -> None:
        """Admits a request; vLLM's per-request metrics, where it made some, give way to ours."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            options = RequestOptions.of(request.sampling_params, self._engine_options)
            has_passes = options.fills_blocks or options.verifies
            request.spec_decode_metrics = RequestDenoisingMetrics.new(self.num_spec_tokens) if has_passes else None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's schedule, in which blocks come first, and prompts beside them get a share of the step."""
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
            self._known.pop(req_id, None)
        for new in output.scheduled_new_reqs:  # after a preemption again
            known = self._known.start(new)
            if known.options.mode == "auto":
                self._choose(known)
                new.sampling_params = known.first_params(new.sampling_params)
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """What the next step schedules of each request beyond the tokens it has, see :meth:`RunningRequest.drafts`."""
        self._known.put_drafts(draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, after the step is counted and prompt scores are kept for the first output."""
        returned = reports(model_runner_output)
        reading = self._known.read_prompts(scheduler_output)
        # Also for requests aborted while the step ran: the worker has run their rows.
        self._known.count(returned, self._costs, self.requests, self.spec_decode_metrics_level == "detailed")
        num_sampled = {req_id: sampled for req_id, (_, sampled) in returned.items()}
        rows_of_mode = Counter(self._known[req_id].mode for req_id in returned)
        self._mode_control.step_ends(rows_of_mode, sum(num_sampled.values()), bool(reading))
        self._held_scores.exchange(model_runner_output, num_sampled, self._is_waiting)
        for req_id, sampled in num_sampled.items():
            known, request = self._known[req_id], self.requests.get(req_id)
            if request is None or not sampled:
                continue
            if req_id in reading and not known.has_grammar:
                # What the prompt's last step returns lies in pages beyond those it had scheduled.
                request.num_computed_tokens += sampled
            if known.options.mode == "auto":
                self._choose(known)
        failed = self.finish_requests(
            [req_id for req_id, (report, _) in returned.items() if not report.is_finite], _FAILED
        )
        self._costs.not_finite += len(failed)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._found_pages.cache(*self.running)
        send_traces(returned, outputs)
        answer_failed(failed, outputs)
        return outputs

    def _mamba_block_aligned_split(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> int:
        # Without room for a whole page a prompt would wait until the blocks beside it are finished.
        return super()._mamba_block_aligned_split(request, num_new_tokens, *args, **kwargs) or num_new_tokens

    def _free_request_blocks(self, request: Request) -> None:
        if request.status == _FAILED:
            self._found_pages.forget(request)
        else:
            self._found_pages.cache(request)
        super()._free_request_blocks(request)

    def _choose(self, known: RunningRequest) -> None:
        """Sets how an ``auto`` request goes on, and counts it."""
        decision = self._mode_control.choose(self.current_step, len(self.running), known.options.lossless)
        known.mode = decision.mode
        self._costs.add_choice(decision, self._mode_control.take_changes())

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
