"""What a TwoTower engine counts: a step's costs, a request's denoiser passes, and the Prometheus metrics of both.

``docs/metrics.md`` lists every metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import prometheus_client
from vllm.config import SpeculativeConfig
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from .mode_control import ModeDecision

EAGER_REASONS = ("mixed", "options", "many")
"""Why a row runs without a CUDA graph, though there are some; see :data:`HELP`."""
CONTEXT_PASSES = "vllm:twotower_num_context_passes"
BLOCKS = "vllm:twotower_num_blocks"
FORCED_BLOCKS = "vllm:twotower_num_forced_blocks"
NOT_FINITE = "vllm:twotower_num_requests_not_finite"
STEPS_PER_BLOCK = "vllm:twotower_denoising_steps_per_block"
DRAFT_TOKENS = "vllm:twotower_num_draft_tokens"
ACCEPTED_TOKENS = "vllm:twotower_num_accepted_tokens"
ACCEPTED_PER_DRAFT = "vllm:twotower_accepted_tokens_per_draft"
EAGER = {reason: f"vllm:twotower_num_eager_rows_{reason}" for reason in EAGER_REASONS}
AUTO_AR_CHOICES = "vllm:twotower_num_auto_ar_choices"
AUTO_DIFFUSION_CHOICES = "vllm:twotower_num_auto_diffusion_choices"
AUTO_VERIFIED_CHOICES = "vllm:twotower_num_auto_verified_choices"
AUTO_MODE_CHANGES = "vllm:twotower_num_auto_mode_changes"
AUTO_AR_SECONDS = "vllm:twotower_auto_predicted_ar_seconds"
AUTO_DIFFUSION_SECONDS = "vllm:twotower_auto_predicted_diffusion_seconds"
AUTO_VERIFIED_SECONDS = "vllm:twotower_auto_predicted_verified_seconds"

HELP = {
    CONTEXT_PASSES: "Number of rows the context tower ran: prompt chunks, blocks, drafts and autoregressive tokens.",
    BLOCKS: "Number of finished blocks.",
    FORCED_BLOCKS: "Number of finished blocks that took all the denoising steps their request allows.",
    NOT_FINITE: "Number of requests that ended with an error because their logits were not finite.",
    STEPS_PER_BLOCK: "Histogram of denoising steps per finished block.",
    DRAFT_TOKENS: "Number of tokens that the denoiser drafted and the context tower verified.",
    ACCEPTED_TOKENS: "Number of drafted tokens that were accepted.",
    ACCEPTED_PER_DRAFT: "Histogram of accepted tokens per verified draft.",
    EAGER["mixed"]: "Number of rows that ran without a CUDA graph beside prompts or rows of other widths.",
    EAGER["options"]: "Number of rows that ran without a CUDA graph for options that graphs do not know.",
    EAGER["many"]: "Number of rows that ran without a CUDA graph as there were more of them than in the largest.",
    AUTO_AR_CHOICES: "Number of times that requests with diffusion_mode 'auto' went on token by token.",
    AUTO_DIFFUSION_CHOICES: "Number of times that requests with diffusion_mode 'auto' went on by mask diffusion.",
    AUTO_VERIFIED_CHOICES: "Number of times that requests with diffusion_mode 'auto' went on by verified drafts.",
    AUTO_MODE_CHANGES: "Number of times that diffusion_mode 'auto' went from one mode to the other.",
    AUTO_AR_SECONDS: "Seconds for a block of every open request token by token, measured before the last choice.",
    AUTO_DIFFUSION_SECONDS: "Seconds for a block of every open request by diffusion, measured before the last choice.",
    AUTO_VERIFIED_SECONDS: "Seconds for as many tokens by verified drafts, measured before the last choice.",
}
GAUGES = (AUTO_AR_SECONDS, AUTO_DIFFUSION_SECONDS, AUTO_VERIFIED_SECONDS)
BUCKETS = {
    STEPS_PER_BLOCK: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64],
    ACCEPTED_PER_DRAFT: [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 15, 31],
}


@dataclass
class StepCosts:
    """What one engine step cost, summed over its requests.

    A pass is one tower's run over one row. ``denoiser_passes`` looked at ``canvas_positions`` positions;
    ``steps_per_block`` has the denoiser passes of each block that was finished, ``forced_blocks`` counts those that
    took all that their request allows, and ``committed_tokens`` are the tokens of all of them. Of blocks that were
    verified ``drafted_tokens`` were drafts, and ``accepted_per_draft`` has how many of them were right, for each block.
    ``not_finite`` requests ended because their logits were not. ``auto`` requests chose ``auto_<mode>`` times a mode,
    and the choice changed ``auto_changes`` times; ``auto_<mode>_us`` are the microseconds that it rests on, 0 without
    any. Where the engine has CUDA graphs, ``eager_<reason>`` rows ran without one.
    """

    denoiser_passes: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    context_passes: int = 0
    forced_blocks: int = 0
    drafted_tokens: int = 0
    auto_ar: int = 0
    auto_mask_diffusion: int = 0
    auto_verified: int = 0
    auto_changes: int = 0
    auto_ar_us: int = 0
    auto_mask_diffusion_us: int = 0
    auto_verified_us: int = 0
    not_finite: int = 0
    eager_mixed: int = 0
    eager_options: int = 0
    eager_many: int = 0
    steps_per_block: list[int] = field(default_factory=list)
    accepted_per_draft: list[int] = field(default_factory=list)

    def add_choice(self, decision: ModeDecision, num_changes: int) -> None:
        """Counts how an ``auto`` request goes on, and changes of the mode before."""
        name = f"auto_{decision.mode}"
        setattr(self, name, getattr(self, name) + 1)
        self.auto_changes += num_changes
        for mode, seconds in decision.seconds.items():
            setattr(self, f"auto_{mode}_us", round(seconds * 1e6))

    def add_eager(self, why: int) -> None:
        """Counts a row that ran without a CUDA graph, if it did: the reason as :class:`~.report.Report` has it."""
        if why:
            name = f"eager_{EAGER_REASONS[why - 1]}"
            setattr(self, name, getattr(self, name) + 1)

    def pack(self, num_spec_tokens: int) -> SpecDecodingStats | None:
        """The costs in the form that reaches the front end, ``None`` if there are none.

        vLLM decodes its statistics strictly, but leaves the list of accepted tokens by position to diffusion models:
        here it holds the fields of ``_IN_LIST``, the number of drafts, their accepted tokens, and then the denoiser
        passes of each finished block.
        """
        if self == StepCosts():
            return None
        lists = [len(self.accepted_per_draft), *self.accepted_per_draft, *self.steps_per_block]
        return SpecDecodingStats(
            num_spec_tokens,
            num_drafts=self.denoiser_passes,
            num_draft_tokens=self.canvas_positions,
            num_accepted_tokens=self.committed_tokens,
            num_accepted_tokens_per_pos=[*(getattr(self, name) for name in _IN_LIST), *lists],
        )

    @classmethod
    def unpack(cls, stats: SpecDecodingStats) -> StepCosts:
        """The reverse of :meth:`pack`."""
        values = stats.num_accepted_tokens_per_pos
        num_drafts, *lists = values[len(_IN_LIST) :] or [0]
        return cls(
            denoiser_passes=stats.num_drafts,
            canvas_positions=stats.num_draft_tokens,
            committed_tokens=stats.num_accepted_tokens,
            accepted_per_draft=lists[:num_drafts],
            steps_per_block=lists[num_drafts:],
            **dict(zip(_IN_LIST, values, strict=False)),
        )


_IN_LIST = (
    "context_passes",
    "forced_blocks",
    "drafted_tokens",
    "auto_ar",
    "auto_mask_diffusion",
    "auto_verified",
    "auto_changes",
    "auto_ar_us",
    "auto_mask_diffusion_us",
    "auto_verified_us",
    "not_finite",
    *(f"eager_{reason}" for reason in EAGER_REASONS),
)


class RequestDenoisingMetrics(RequestSpecDecodeMetrics):
    """One request's denoiser passes: ``histogram[n]`` of them committed a block of n tokens, n = 0 none.

    A pass over w positions has proposed w tokens, and the pass after which a block was whole has accepted its tokens.
    Of verified blocks it has the drafts instead, as vLLM has those of speculative decoding.
    """

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        """Nothing: vLLM calls this for every scheduled canvas, whether the denoiser ran on it or not."""

    def add_draft(self, num_draft_tokens: int, num_accepted: int, detailed: bool) -> None:
        """Counts a draft, of which so many tokens were accepted; ``detailed`` also keeps it in the list of all."""
        super().observe(num_draft_tokens, num_accepted, detailed)

    def add_passes(self, count: int, num_positions: int, detailed: bool) -> None:
        """Counts passes over so many positions; ``detailed`` also keeps them in the lists of all."""
        for _ in range(count):
            super().observe(num_positions, 0, detailed)

    def finish_block(self, num_tokens: int) -> None:
        """Credits the last pass with the block that it made whole."""
        self.histogram[0] -= 1
        self.histogram[num_tokens] += 1
        if self.per_step_accepted:
            self.per_step_accepted[-1] = num_tokens


class TwoTowerProm(SpecDecodingProm):
    """vLLM's three diffusion metrics, and those of :data:`HELP`."""

    _histogram_cls = prometheus_client.Histogram

    def __init__(
        self,
        speculative_config: SpeculativeConfig | None,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        is_diffusion: bool = False,
    ):
        super().__init__(speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        self._metrics = {
            name: create_metric_per_engine(
                self._histogram_cls(name=name, documentation=text, labelnames=labelnames, buckets=BUCKETS[name])
                if name in BUCKETS
                else prometheus_client.Gauge(name, text, labelnames, multiprocess_mode="mostrecent")
                if name in GAUGES
                else self._counter_cls(name=name, documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, text in HELP.items()
        }

    def observe(self, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0) -> None:
        """Adds the packed costs of one step of one engine."""
        super().observe(spec_decoding_stats, engine_idx)
        costs = StepCosts.unpack(spec_decoding_stats)
        counts = {
            CONTEXT_PASSES: costs.context_passes,
            BLOCKS: len(costs.steps_per_block),
            FORCED_BLOCKS: costs.forced_blocks,
            DRAFT_TOKENS: costs.drafted_tokens,
            ACCEPTED_TOKENS: sum(costs.accepted_per_draft),
            NOT_FINITE: costs.not_finite,
            AUTO_AR_CHOICES: costs.auto_ar,
            AUTO_DIFFUSION_CHOICES: costs.auto_mask_diffusion,
            AUTO_VERIFIED_CHOICES: costs.auto_verified,
            AUTO_MODE_CHANGES: costs.auto_changes,
            **{name: getattr(costs, f"eager_{reason}") for reason, name in EAGER.items()},
        }
        for name, count in counts.items():
            self._metrics[name][engine_idx].inc(count)
        if costs.auto_ar or costs.auto_mask_diffusion or costs.auto_verified:
            self._metrics[AUTO_AR_SECONDS][engine_idx].set(costs.auto_ar_us * 1e-6)
            self._metrics[AUTO_DIFFUSION_SECONDS][engine_idx].set(costs.auto_mask_diffusion_us * 1e-6)
            self._metrics[AUTO_VERIFIED_SECONDS][engine_idx].set(costs.auto_verified_us * 1e-6)
        for name, values in ((STEPS_PER_BLOCK, costs.steps_per_block), (ACCEPTED_PER_DRAFT, costs.accepted_per_draft)):
            for value in values:
                self._metrics[name][engine_idx].observe(value)
