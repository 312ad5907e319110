"""What the scheduler knows of each running request, and what its row cost in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_twotower.options import FIRST_MODE, EngineOptions, RequestOptions
from vllm_twotower.trace import TRACE

from .metrics import RequestDenoisingMetrics, StepCosts
from .mode_control import BlockMode
from .report import Report

logger = init_logger(__name__)

NOT_FINITE = "the model's logits are not finite (NaN or infinite)"
"""The stop reason of a request that ends because of it."""


@dataclass
class RunningRequest:
    """A request that the worker knows.

    The first ``prefill_len`` tokens are read as a prompt, after a preemption also those generated before. The block
    that is being filled had ``num_passes`` denoiser passes. Blocks are filled in ``mode``, for ``auto`` in the one that
    was chosen. Of the tokens that vLLM counts as computed the context tower has yet to read the last ``unread``.
    """

    options: RequestOptions
    has_grammar: bool
    prefill_len: int
    mode: BlockMode
    num_passes: int = 0
    unread: int = 0

    @classmethod
    def of(cls, new: NewRequestData, engine: EngineOptions) -> RunningRequest:
        """A request that the worker is told of for the first time, or again."""
        params = new.sampling_params
        options = RequestOptions.of(params, engine)
        mode = "ar" if options.mode == "auto" else options.mode  # until it is chosen
        return cls(options, params.structured_outputs is not None, len(new.prefill_token_ids), mode)

    def first_params(self, params: SamplingParams) -> SamplingParams:
        """The sampling parameters with the worker's note of how an ``auto`` request starts."""
        params = copy(params)
        params.extra_args = {**(params.extra_args or {}), FIRST_MODE: self.mode}
        return params

    def drafts(self, placeholders: list[int]) -> list[int]:
        """What stands for the tokens to come, see :class:`~.step_rows.StepRows`."""
        if self.has_grammar:
            return []
        return placeholders[: 1 if self.mode == "ar" else self.options.canvas_length]

    def count(
        self,
        report: Report,
        num_sampled: int,
        costs: StepCosts,
        metrics: RequestDenoisingMetrics | None,
        detailed: bool,
    ) -> None:
        """Adds what the row cost to the step's costs and the request's metrics."""
        self.unread = report.unread
        costs.add_eager(report.why_eager)
        costs.context_passes += report.context_passes
        costs.denoiser_passes += report.denoiser_passes
        costs.canvas_positions += report.denoiser_passes * report.width
        self.num_passes += report.denoiser_passes
        is_block = num_sampled and self.num_passes
        is_draft = report.num_accepted >= 0
        if metrics is not None and is_draft:
            metrics.add_draft(report.width - 1, report.num_accepted, detailed)
        elif metrics is not None:
            metrics.add_passes(report.denoiser_passes, report.width, detailed)
            if is_block:
                metrics.finish_block(num_sampled)
        if is_block:
            costs.committed_tokens += num_sampled
            costs.steps_per_block.append(self.num_passes)
            if is_draft:
                costs.drafted_tokens += report.width - 1
                costs.accepted_per_draft.append(report.num_accepted)
            else:
                costs.forced_blocks += self.num_passes >= self.options.max_steps
            self.num_passes = 0


class RunningRequests(dict[str, RunningRequest]):
    """Those that the worker knows, by id."""

    def __init__(self, engine: EngineOptions):
        super().__init__()
        self._engine = engine

    def start(self, new: NewRequestData) -> RunningRequest:
        """Adds a request that the worker is told of, for the first time or after a preemption."""
        self[new.req_id] = request = RunningRequest.of(new, self._engine)
        return request

    def put_drafts(self, drafts: DraftTokenIds) -> None:
        """Puts what the next step schedules of each request in the place of the placeholders."""
        for i, req_id in enumerate(drafts.req_ids):
            if (known := self.get(req_id)) is not None:
                drafts.draft_token_ids[i] = known.drafts(drafts.draft_token_ids[i])

    def count(
        self,
        returned: Mapping[str, tuple[Report, int]],
        costs: StepCosts,
        requests: Mapping[str, Request],
        detailed: bool,
    ) -> None:
        """Adds what the rows of a step cost, see :func:`reports`; of requests that ended while it ran, to it alone."""
        for req_id, (report, num_sampled) in returned.items():
            request = requests.get(req_id)
            metrics = None if request is None else request.spec_decode_metrics
            self[req_id].count(report, num_sampled, costs, metrics, detailed)

    def unread(self, request: Request) -> int:
        """How many of the tokens that vLLM counts as computed the context tower reads in a later step."""
        known = self.get(request.request_id)
        is_new = request.num_computed_tokens == 0  # or preempted
        return 0 if is_new or known is None else known.unread

    def read_prompts(self, step: SchedulerOutput) -> set[str]:
        """Of a step's requests those of whose prompts it reads a part."""
        cached = step.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        return {req_id for req_id, start in starts.items() if start < self[req_id].prefill_len}


def reports(returned: ModelRunnerOutput) -> Mapping[str, tuple[Report, int]]:
    """The report and the number of sampled tokens of every row of a step; takes the reports out of ``returned``."""
    packed, returned.num_nans_in_logits = returned.num_nans_in_logits or {}, None
    sampled = returned.sampled_token_ids
    return {
        name: (Report.unpack(packed.get(name, 0)), len(sampled[row]) if sampled else 0)
        for name, row in returned.req_id_to_index.items()
    }


def send_traces(returned: Mapping[str, tuple[Report, int]], outputs: dict[int, EngineCoreOutputs]) -> None:
    """Puts the traces of a step's tokens into its outputs, by client, as if they were parameters of a KV transfer."""
    for output in (output for of_client in outputs.values() for output in of_client.outputs):
        if output.request_id in returned and (trace := returned[output.request_id][0].trace):
            output.kv_transfer_params = {TRACE: trace}


def answer_failed(failed: Sequence[Request], outputs: dict[int, EngineCoreOutputs]) -> None:
    """Adds the answers of requests that a step has ended to its outputs, by client."""
    for request in failed:
        logger.error("Request %s ended: %s.", request.request_id, NOT_FINITE)
        output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=NOT_FINITE)
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
