"""What the scheduler knows of each running request, and what its row cost in a step."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_twotower.config import FIRST_MODE, EngineOptions, RequestOptions

from .metrics import RequestDenoisingMetrics, StepCosts
from .prefix_cache import next_stop


@dataclass(frozen=True)
class RowWork:
    """What the worker did with one row in a step.

    ``context_len`` tokens were computed before; the context tower read ``context_tokens``, if it ran; the denoiser ran
    ``denoiser_passes`` times over a canvas of ``width`` positions; ``num_sampled`` tokens came back. The logits they
    were chosen by may not have been ``is_finite``.
    """

    context_len: int
    context_tokens: int
    denoiser_passes: int
    width: int
    num_sampled: int
    is_finite: bool = True


@dataclass
class Row:
    """A request that the worker has a row for.

    The first ``prefill_len`` tokens are read as a prompt, after a preemption also those generated before. The block
    that is being filled had ``num_passes`` denoiser passes. An ``auto`` request generates single tokens while
    ``is_single``, of which it has ``num_singles`` since its last choice; ``at_border``: it may choose again. Of the
    tokens that vLLM counts as computed the context tower has yet to read the last ``unread``.
    """

    options: RequestOptions
    prefill_len: int
    max_model_len: int
    num_passes: int = 0
    is_single: bool = False
    num_singles: int = 0
    at_border: bool = False
    unread: int = 0

    @classmethod
    def of(cls, new: NewRequestData, engine: EngineOptions, max_model_len: int) -> Row:
        """The row of a request that the worker is told of for the first time, or again."""
        return cls(RequestOptions.of(new.sampling_params, engine), len(new.prefill_token_ids), max_model_len)

    @property
    def is_auto_at_border(self) -> bool:
        return self.at_border and self.options.mode == "auto"

    def first_params(self, params: SamplingParams) -> SamplingParams:
        """The sampling parameters with the worker's note of how an ``auto`` request starts."""
        params = copy(params)
        params.extra_args = {**(params.extra_args or {}), FIRST_MODE: "ar" if self.is_single else "mask_diffusion"}
        return params

    def drafts(self, placeholders: list[int]) -> list[int]:
        """The draft tokens to schedule next: a canvas, none, or one for a single token of an ``auto`` request."""
        if not self.options.fills_blocks:
            return []
        return placeholders[: 1 if self.is_single else self.options.canvas_length]

    def work(self, start: int, num_scheduled: int, passes: int, num_sampled: int) -> RowWork:
        """What was done with the row; ``passes`` is the worker's account, see ``StepOutput.account``."""
        is_finite, passes = passes >= 0, max(passes, ~passes)
        denoised, context = divmod(passes, 2)
        width = min(self.options.canvas_length, self.max_model_len - max(start, self.prefill_len))
        read = num_scheduled if start < self.prefill_len else 1 if self.is_single else width
        return RowWork(start, context * read, denoised, width, num_sampled, is_finite)

    def follow(self, work: RowWork, commit_interval: int) -> None:
        """Keeps account of what the context tower has yet to read; commits stop as in ``step_plan.split_rows``."""
        start = work.context_len
        if self.unread and work.context_tokens:
            self.unread = max(0, start - next_stop(start - self.unread, commit_interval))
        if work.num_sampled and self.options.fills_blocks:
            self.unread = work.num_sampled

    def count(self, work: RowWork, costs: StepCosts, metrics: RequestDenoisingMetrics | None, detailed: bool) -> None:
        """Adds the row's work to the step's costs and the request's metrics."""
        costs.context_passes += work.context_tokens > 0
        costs.denoiser_passes += work.denoiser_passes
        costs.canvas_positions += work.denoiser_passes * work.width
        self.num_passes += work.denoiser_passes
        if metrics is not None:
            for _ in range(work.denoiser_passes):
                metrics.add_pass(work.width, detailed)
        self.at_border = False
        if work.num_sampled and self.num_passes:
            costs.committed_tokens += work.num_sampled
            costs.steps_per_block.append(self.num_passes)
            costs.forced_blocks += self.num_passes >= self.options.max_steps
            self.num_passes, self.at_border = 0, True
            if metrics is not None:
                metrics.finish_block(work.num_sampled)
        elif work.num_sampled:
            self.num_singles += 1
            self.at_border = self.num_singles % self.options.canvas_length == 0


def rows_work(rows: Mapping[str, Row], scheduled: SchedulerOutput, returned: ModelRunnerOutput) -> dict[str, RowWork]:
    """The work of every row of a step by request; takes the worker's account of passes out of ``returned``."""
    passes, returned.num_nans_in_logits = returned.num_nans_in_logits or {}, None
    cached = scheduled.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    index, sampled = returned.req_id_to_index, returned.sampled_token_ids
    return {
        name: rows[name].work(
            start,
            scheduled.num_scheduled_tokens[name],
            passes.get(name, 0),
            len(sampled[index[name]]) if sampled else 0,
        )
        for name, start in starts.items()
    }
