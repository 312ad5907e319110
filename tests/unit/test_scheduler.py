"""The scheduler without an engine: which class is used, when prompt scores go out, and how statistics travel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import golden_data
import numpy as np
import prometheus_client
import pytest
import torch

pytest.importorskip("vllm")
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingProm
from vllm.v1.structured_output import StructuredOutputManager

import vllm_twotower
from vllm_twotower.architecture import ARCHITECTURE
from vllm_twotower.engine.metrics import BUCKETS, GAUGES, HELP, RequestDenoisingMetrics, StepCosts, TwoTowerProm
from vllm_twotower.engine.prefix_cache import check_page_size
from vllm_twotower.engine.report import Report
from vllm_twotower.engine.scheduler import TwoTowerScheduler
from vllm_twotower.engine_config import SCHEDULER_CLS

WIDTH = 16
PAGE = 16


class OwnScheduler(TwoTowerScheduler):
    """What a user may build on the package's scheduler."""


def config(**options: Any) -> VllmConfig:
    vllm_twotower.register()
    arguments = {"model": str(golden_data.checkpoint("A")), "dtype": "float32", "max_model_len": 256}
    return EngineArgs(**arguments, **options).create_engine_config()


def test_chosen_by_default() -> None:
    assert config().scheduler_config.scheduler_cls == SCHEDULER_CLS
    assert config().scheduler_config.get_scheduler_cls() is TwoTowerScheduler


@pytest.mark.parametrize("chosen", [OwnScheduler, f"{__name__}.OwnScheduler", SCHEDULER_CLS])
def test_own_scheduler_stays(chosen: type | str) -> None:
    assert config(scheduler_cls=chosen).scheduler_config.scheduler_cls == chosen


@pytest.mark.parametrize(
    "chosen",
    [DiffusionScheduler, "vllm.v1.core.sched.scheduler.Scheduler", "no.such.Scheduler", "nothing", f"{__name__}.WIDTH"],
    ids=str,
)
def test_other_schedulers_are_refused(chosen: type | str) -> None:
    with pytest.raises(ValueError) as error:
        config(scheduler_cls=chosen)
    assert f"scheduler_cls={chosen!r}" in str(error.value)
    assert SCHEDULER_CLS in str(error.value)


@pytest.mark.parametrize("level", ["none", "summary", "detailed"])
def test_level_of_request_metrics_reaches_the_scheduler(level: str) -> None:
    assert scheduler(per_request_spec_decode_metrics=level).spec_decode_metrics_level == level


def scheduler(enable_prefix_caching: bool = False, num_pages: int = 10_000, **options: Any) -> TwoTowerScheduler:
    """A scheduler with so many pages; the cache's layout does not matter here."""
    made = config(max_num_batched_tokens=128, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching, **options)
    made.cache_config.num_gpu_blocks = num_pages
    init_none_hash(sha256)
    group = KVCacheGroupSpec(
        ["layer"], FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    )
    return TwoTowerScheduler(
        vllm_config=made,
        kv_cache_config=KVCacheConfig(num_pages, [], [group]),
        structured_output_manager=StructuredOutputManager(made),
        block_size=PAGE,
        log_stats=True,
    )


@pytest.fixture
def made() -> TwoTowerScheduler:
    return scheduler(per_request_spec_decode_metrics="summary")


def add(
    made: TwoTowerScheduler,
    name: str,
    prompt_len: int,
    max_tokens: int = WIDTH,
    mode: str = "mask_diffusion",
    priority: int = 0,
) -> None:
    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=max_tokens, extra_args={"diffusion_mode": mode}, prompt_logprobs=0
    )
    hasher = get_request_block_hasher(PAGE, sha256)
    request = Request(name, [7] * prompt_len, params, pooling_params=None, block_hasher=hasher, priority=priority)
    made.add_request(request)


def packed(report: Report) -> int:
    """The number in which the worker sends it."""
    rows = SimpleNamespace(
        context_passes=np.array([report.context_passes]),
        denoiser_passes=np.array([report.denoiser_passes]),
        is_ar=np.array([False]),
        num_accepted=np.array([report.num_accepted]),
        room=np.array([report.width]),
        computed_unread=np.array([report.unread]),
        why_eager=np.array([report.why_eager]),
    )
    return int(Report.pack(rows, np.array([report.is_finite]))[0])


def step(
    made: TwoTowerScheduler,
    sampled: dict[str, int],
    scores: dict[str, LogprobsTensors] | None = None,
    token_scores: dict[str, torch.Tensor] | None = None,
    reports: dict[str, Report] | None = None,
    abort_meanwhile: str | None = None,
) -> dict[str, EngineCoreOutput]:
    """One step in which requests sample so many tokens, and the worker returns prompt scores and reports of some."""
    scheduled = made.schedule()
    names = list(scheduled.num_scheduled_tokens)
    if abort_meanwhile is not None:
        made.finish_requests(abort_meanwhile, RequestStatus.FINISHED_ABORTED)
    outputs = made.update_from_output(
        scheduled,
        ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[9] * sampled.get(name, 0) for name in names],
            prompt_logprobs_dict=dict(scores or {}),
            prompt_token_id_logprobs_dict=dict(token_scores or {}),
            num_nans_in_logits={name: packed(report) for name, report in (reports or {}).items()},
        ),
    )
    made.update_draft_token_ids(DraftTokenIds(names, [[3] * WIDTH for _ in names]))
    return {output.request_id: output for outs in outputs.values() for output in outs.outputs}


SCORES = LogprobsTensors(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4))


def test_prompt_scores_wait_for_the_first_block(made: TwoTowerScheduler) -> None:
    add(made, "a", 5)
    add(made, "b", 5, mode="ar")
    outputs = step(made, {"b": 1}, {"a": SCORES, "b": SCORES}, {"a": torch.ones(1)})
    assert outputs.keys() == {"b"}
    assert outputs["b"].new_prompt_logprobs_tensors is SCORES
    assert step(made, {"b": 1})["b"].new_prompt_logprobs_tensors is None
    output = step(made, {"a": WIDTH})["a"]
    assert output.new_prompt_logprobs_tensors is SCORES
    assert output.prompt_token_id_logprobs.tolist() == [1]
    assert output.finished
    assert not made._held_scores


def test_prompt_scores_go_with_their_request(made: TwoTowerScheduler) -> None:
    """Aborted while it waits for its first block, and while the step runs that returns the scores."""
    add(made, "a", 5)
    step(made, {}, {"a": SCORES}, {"a": torch.ones(1)})
    assert made._held_scores
    made.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert not made._held_scores
    add(made, "b", 5)
    assert not step(made, {}, {"b": SCORES}, {"b": torch.ones(1)}, abort_meanwhile="b")
    assert not made._held_scores
    step(made, {})
    assert not made._known


def test_prompt_scores_survive_a_preemption(made: TwoTowerScheduler) -> None:
    """The worker reads the prompt again and returns new scores, which replace those that were kept."""
    add(made, "a", 5)
    step(made, {}, {"a": SCORES})
    step(made, {})
    made.reset_prefix_cache(reset_running_requests=True)
    again = LogprobsTensors(torch.ones(4, 1), torch.ones(4, 1), torch.ones(4))
    step(made, {}, {"a": again})
    assert step(made, {"a": WIDTH})["a"].new_prompt_logprobs_tensors is again


def test_preempted_passes_are_in_no_block(made: TwoTowerScheduler) -> None:
    """Three passes, a preemption, a block in two passes, which the context tower reads anew after another one."""
    add(made, "a", 5, max_tokens=2 * WIDTH)
    sent: list[StepCosts] = []
    make_stats = made.make_stats

    def record(*args: Any, **kwargs: Any) -> SchedulerStats:
        stats = make_stats(*args, **kwargs)
        if stats.spec_decoding_stats is not None:
            sent.append(StepCosts.unpack(stats.spec_decoding_stats))
        return stats

    made.make_stats = record
    first, again, whole = ({"a": Report(*passes, WIDTH)} for passes in ((1, 1), (0, 1), (0, 2)))
    for reports in (first, again, again):
        step(made, {}, reports=reports)
    made.reset_prefix_cache(reset_running_requests=True)
    step(made, {}, reports=first)
    step(made, {"a": WIDTH}, reports=again)
    made.reset_prefix_cache(reset_running_requests=True)
    step(made, {}, reports={"a": Report(1)})
    output = step(made, {"a": WIDTH}, reports=whole)["a"]
    assert [costs.context_passes for costs in sent] == [1, 0, 0, 1, 0, 1, 0]
    assert [costs.denoiser_passes for costs in sent] == [1, 1, 1, 1, 1, 0, 2]
    assert [costs.steps_per_block for costs in sent if costs.steps_per_block] == [[2], [2]]
    assert output.spec_decode_metrics.histogram == [5] + [0] * (WIDTH - 1) + [2]


def test_a_block_may_be_whole_in_the_prompts_last_step(made: TwoTowerScheduler) -> None:
    """It lies in pages reserved beyond the prompt, and counts as computed like any other block."""
    add(made, "a", 5, max_tokens=2 * WIDTH)
    output = step(made, {"a": WIDTH}, reports={"a": Report(1, 1, WIDTH, WIDTH)})["a"]
    assert len(output.new_token_ids) == WIDTH
    assert made.requests["a"].num_computed_tokens == 5 + WIDTH
    assert made.schedule().num_scheduled_tokens == {"a": WIDTH}


def test_blocks_are_scheduled_before_prompts() -> None:
    """A prompt in chunks came first, but the canvas behind it is whole; the prompt has as much for each request."""
    beside = {"twotower": {"prompt_tokens_beside_blocks": 9}}
    made = scheduler(long_prefill_token_threshold=50, additional_config=beside)
    add(made, "long", 100)
    add(made, "short", 3)
    step(made, {})
    assert made.schedule().num_scheduled_tokens == {"long": 2 * WIDTH, "short": WIDTH}


def test_few_blocks_let_many_prompts_in() -> None:
    """As many tokens as all requests' blocks would take, of those that are admitted."""
    made = scheduler(additional_config={"twotower": {"prompt_tokens_beside_blocks": 1}})
    add(made, "first", 3)
    step(made, {})
    for i in range(5):
        add(made, f"late {i}", 25)
    late = {"late 0": 25, "late 1": 25, "late 2": 4 * WIDTH - 50}
    assert made.schedule().num_scheduled_tokens == {"first": WIDTH, **late}


def test_drafts_stand_for_the_tokens_to_come(made: TwoTowerScheduler) -> None:
    """A canvas for the denoiser, one for any number of tokens of the context tower."""
    expected = {"mask_diffusion": WIDTH, "verified": WIDTH, "ar": 1}
    for mode in expected:
        add(made, mode, 5, max_tokens=2, mode=mode)
    step(made, {"ar": 1, "verified": 1})
    assert {name: len(request.spec_token_ids) for name, request in made.requests.items()} == expected
    assert made.schedule().num_scheduled_tokens == expected


def test_drafts_are_counted(made: TwoTowerScheduler) -> None:
    """As speculative decoding has them; also as blocks, which are never forced."""
    add(made, "a", 5, max_tokens=1 + 12 + WIDTH, mode="verified")
    sent = []
    make_stats = made.make_stats
    made.make_stats = lambda *args, **kwargs: sent.append(make_stats(*args, **kwargs)) or sent[-1]
    step(made, {"a": 1}, reports={"a": Report(1, 0, 1, 1)})
    step(made, {"a": 12}, reports={"a": Report(1, 1, WIDTH, 1, 11)})
    output = step(made, {"a": WIDTH}, reports={"a": Report(1, 2, WIDTH, 1, WIDTH - 1)})["a"]
    costs = [StepCosts.unpack(stats.spec_decoding_stats) for stats in sent]
    assert [cost.accepted_per_draft for cost in costs] == [[], [11], [WIDTH - 1]]
    assert [cost.drafted_tokens for cost in costs] == [0, WIDTH - 1, WIDTH - 1]
    assert [cost.steps_per_block for cost in costs] == [[], [1], [2]]
    assert not any(cost.forced_blocks for cost in costs)
    assert output.spec_decode_metrics.num_draft_tokens == 2 * (WIDTH - 1)
    assert [n for n, count in enumerate(output.spec_decode_metrics.histogram) if count] == [11, WIDTH - 1]


def cached_pages(made: TwoTowerScheduler) -> int:
    return len(made.kv_cache_manager.block_pool.cached_block_hash_to_block)


def test_pages_are_cached_once_they_were_read() -> None:
    """The context tower reads a block in the step after it was returned."""
    made = scheduler(enable_prefix_caching=True)
    add(made, "a", PAGE + 4, max_tokens=4 * WIDTH)
    pages = []
    for sampled in (0, 0, WIDTH, 0, WIDTH, WIDTH, WIDTH):
        step(made, {"a": sampled}, reports={"a": Report(1, 1, WIDTH, unread=sampled)})
        pages.append(cached_pages(made))
    assert pages == [1, 1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("event", ["cached by vLLM", "preempted", "aborted", "aborted meanwhile", "in part"])
def test_an_unread_block_is_not_cached(event: str) -> None:
    made = scheduler(enable_prefix_caching=True)
    add(made, "a", 2 * PAGE - 4, max_tokens=4 * WIDTH)
    step(made, {})
    block = {"a": Report(0, 1, WIDTH, unread=WIDTH)}
    step(made, {"a": WIDTH}, reports=block)
    if event == "cached by vLLM":  # after every step, since vLLM 0.33
        request = made.requests["a"]
        made.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
    elif event == "preempted":
        made._preempt_request(made.running.pop(), 0)
    elif event == "aborted":
        made.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    elif event == "aborted meanwhile":
        step(made, {}, abort_meanwhile="a")
    else:
        made.requests["a"].spec_token_ids = [3] * (WIDTH - 1)
        step(made, {}, reports=block)
        step(made, {}, reports=block)
    assert cached_pages(made) == 1


def test_a_chunk_preempted_in_its_step_is_not_cached() -> None:
    """With priorities a request can be thrown out after its next chunk was scheduled."""
    made = scheduler(
        enable_prefix_caching=True,
        num_pages=11,  # one is never used
        scheduling_policy="priority",
        long_prefill_token_threshold=2 * PAGE,
    )
    made.adaptive_long_prefill_threshold = False
    made._step_budget = 3 * PAGE
    add(made, "low", 7 * PAGE, priority=1)
    step(made, {})
    add(made, "high", 3 * PAGE)
    step(made, {})
    assert made.requests["low"].num_computed_tokens == 5 * PAGE
    assert list(made.schedule().num_scheduled_tokens) == ["high"]
    assert made.requests["low"].num_preemptions == 1
    assert cached_pages(made) == 5


def test_pages_of_the_context_towers_blocks() -> None:
    """The last token of a block is read in the next step."""
    made = scheduler(enable_prefix_caching=True)
    add(made, "a", PAGE - 1, max_tokens=3 * PAGE, mode="ar")
    pages = []
    for sampled in (1, 2, WIDTH, WIDTH):
        step(made, {"a": sampled}, reports={"a": Report(sampled, unread=1)})
        pages.append(cached_pages(made))
    assert made.requests["a"].num_computed_tokens == PAGE + 2 + 2 * WIDTH
    assert pages == [0, 1, 2, 3]


def test_pages_hold_two_canvases() -> None:
    spec = MambaSpec(block_size=30, shapes=((1,),), dtypes=(torch.float32,), mamba_cache_mode="align")
    cache = KVCacheConfig(9, [], [KVCacheGroupSpec(["layer"], spec)])
    check_page_size(cache, 15)
    with pytest.raises(ValueError, match=r"canvas_length=16 .* pages of 30 tokens: set block_size=32"):
        check_page_size(cache, 16)


COSTS = StepCosts(3, 40, 32, 5, 1, 30, 4, 7, 8, 1, 250, 125, 500, 6, 9, 10, 11, [2, 16], [0, 11])


def test_costs_travel_to_the_front_end() -> None:
    """Through vLLM's encoding, which knows its own classes only."""
    assert StepCosts().pack(WIDTH) is None
    metrics = RequestDenoisingMetrics.new(WIDTH)
    metrics.observe(WIDTH, 3)
    metrics.add_passes(1, WIDTH, detailed=True)
    metrics.finish_block(WIDTH)
    sent = EngineCoreOutputs(
        outputs=[EngineCoreOutput("a", [1], spec_decode_metrics=metrics)],
        scheduler_stats=SchedulerStats(spec_decoding_stats=COSTS.pack(WIDTH)),
    )
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert StepCosts.unpack(received.scheduler_stats.spec_decoding_stats) == COSTS
    histogram = [0] * WIDTH + [1]
    assert received.outputs[0].spec_decode_metrics == RequestSpecDecodeMetrics(
        WIDTH, histogram, WIDTH, per_step_accepted=[WIDTH], per_step_drafted=[WIDTH]
    )


def sample(name: str, engine: int) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(name, {"model_name": "m", "engine": str(engine)})


def test_prometheus_keeps_engines_apart() -> None:
    """Several engines in one front end, and a new front end in the same process."""
    for _ in range(2):
        unregister_vllm_metrics()
        made = TwoTowerProm(None, ["model_name", "engine"], {i: ["m", str(i)] for i in range(2)}, is_diffusion=True)
        made.observe(COSTS.pack(WIDTH), engine_idx=1)
        made.observe(COSTS.pack(WIDTH), engine_idx=1)
        counters = [name for name in HELP if name not in BUCKETS and name not in GAUGES]
        assert [sample(f"{name}_total", 0) for name in counters] == [0] * 13
        assert [sample(f"{name}_total", 1) for name in counters] == [10, 4, 2, 12, 60, 22, 18, 20, 22, 8, 14, 16, 2]
        assert [sample(name, 1) for name in GAUGES] == [250e-6, 125e-6, 500e-6]
        assert [sample(f"{name}_sum", 1) for name in BUCKETS] == [36, 22]
        assert sample("vllm:diffusion_num_committed_tokens_total", 1) == 64
    unregister_vllm_metrics()


@pytest.mark.parametrize(
    ("architecture", "expected"), [(ARCHITECTURE, TwoTowerProm), ("LLaDA2MoeModelLM", SpecDecodingProm)]
)
def test_other_models_keep_their_metrics(architecture: str, expected: type) -> None:
    vllm_twotower.register()
    logger = object.__new__(PrometheusStatLogger)
    logger.vllm_config = SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture]))
    assert logger._spec_decoding_cls is expected
