"""Every count is exact: against the plain model's passes, and against the rows that the worker's towers really ran."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import golden_data
import prometheus_client
import pytest
from engines import assert_idle, core, generate, runner, running_engine
from vllm import LLM, RequestOutput, SamplingParams
from vllm.v1.metrics.reader import Histogram
from vllm.v1.request import RequestStatus

from vllm_twotower.engine.metrics import (
    BLOCKS,
    BUCKETS,
    CONTEXT_PASSES,
    FORCED_BLOCKS,
    HELP,
    STEPS_PER_BLOCK,
)
from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion
from vllm_twotower.reference.generate import Generation

CHECKPOINT = golden_data.checkpoint("A")
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
DENOISING_STEPS = "vllm:diffusion_num_denoising_steps"
CANVAS_POSITIONS = "vllm:diffusion_num_canvas_positions"
COMMITTED_TOKENS = "vllm:diffusion_num_committed_tokens"
PAGE = 128
STATISTICS = {"disable_log_stats": False, "per_request_spec_decode_metrics": "detailed"}


@dataclass(frozen=True)
class Task:
    """A mask-diffusion request, and how the plain model answers it."""

    prompt: tuple[int, ...]
    max_tokens: int
    width: int = 16
    steps: int = 16
    threshold: float = 0.8

    def params(self) -> SamplingParams:
        options = {
            "diffusion_canvas_length": self.width,
            "diffusion_max_steps": self.steps,
            "diffusion_confidence_threshold": self.threshold,
        }
        return SamplingParams(temperature=0, ignore_eos=True, max_tokens=self.max_tokens, extra_args=options)

    def expected(self) -> Generation:
        return reference(self)


@cache
def oracle() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(CHECKPOINT)


@cache
def reference(task: Task) -> Generation:
    return generate_mask_diffusion(
        oracle(), task.prompt, task.max_tokens, block_size=task.width, steps=task.steps, gamma=task.threshold
    )


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, 320), k=length))


def figures(llm: LLM) -> dict[str, float]:
    """The values of all diffusion metrics; a histogram gives its count, its sum and its buckets."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        if not metric.name.startswith(("vllm:diffusion", "vllm:twotower")):
            continue
        if isinstance(metric, Histogram):
            values |= {f"{metric.name}_count": metric.count, f"{metric.name}_sum": metric.sum}
            values |= {f"{metric.name}_le_{float(bound):g}": count for bound, count in metric.buckets.items()}
        else:
            values[metric.name] = metric.value
    return values


@dataclass
class Counted:
    """What happened meanwhile: how much the metrics ``grew``, and what the worker's towers ``ran``."""

    grew: dict[str, float]
    ran: Counter[str]

    def check_worker(self) -> None:
        """The metrics count the worker's rows."""
        assert self.grew[CONTEXT_PASSES] == self.ran["context passes"]
        assert self.grew[DENOISING_STEPS] == self.ran["denoiser passes"]
        assert self.grew[CANVAS_POSITIONS] == self.ran["canvas positions"]

    def check_blocks(self, tasks: Sequence[Task]) -> None:
        """Blocks, their tokens and their passes are those of the plain model."""
        blocks = [(len(block), task) for task in tasks for block in task.expected().blocks]
        expected = {
            BLOCKS: len(blocks),
            FORCED_BLOCKS: sum(steps == task.steps for steps, task in blocks),
            COMMITTED_TOKENS: sum(task.width for _, task in blocks),
            f"{STEPS_PER_BLOCK}_count": len(blocks),
            f"{STEPS_PER_BLOCK}_sum": sum(steps for steps, _ in blocks),
            f"{STEPS_PER_BLOCK}_le_inf": len(blocks),
        }
        for bound in BUCKETS[STEPS_PER_BLOCK]:
            expected[f"{STEPS_PER_BLOCK}_le_{bound}"] = sum(steps <= bound for steps, _ in blocks)
        assert {name: self.grew[name] for name in expected} == expected

    def check_passes(self, tasks: Sequence[Task]) -> None:
        """Every denoiser pass belongs to a block of the plain model."""
        assert self.grew[DENOISING_STEPS] == sum(task.expected().nfe for task in tasks)
        assert self.grew[CANVAS_POSITIONS] == sum(task.width * task.expected().nfe for task in tasks)


@contextmanager
def counted(llm: LLM) -> Iterator[Counted]:
    """Reads the metrics before and after, and the plan of every step in between."""
    planner, before = runner(llm).model_state.planner, figures(llm)
    plan_pass, result = planner.plan, Counted({}, Counter())

    def record(step: Any, choice: Any) -> Any:
        is_first = step.plan is None
        plan = plan_pass(step, choice)
        if plan.context is not None:
            result.ran["context passes"] += len(plan.context.rows)
        if plan.canvas is not None:
            result.ran["denoiser passes"] += len(plan.canvas.time)
            result.ran["canvas positions"] += int(plan.canvases.rows.lengths.sum())
            result.ran["further passes"] += 0 if is_first else len(plan.canvas.time)
        if is_first:
            result.ran["idle rows"] += int((step.rows.waits & ~step.rows.is_chunk).sum())
        return plan

    planner.plan = record
    try:
        yield result
    finally:
        del planner.plan
    result.grew = {name: value - before[name] for name, value in figures(llm).items()}


def run(llm: LLM, tasks: Sequence[Task]) -> list[RequestOutput]:
    """The tasks all at once; their tokens are the plain model's."""
    outputs = generate(llm, [task.prompt for task in tasks], [task.params() for task in tasks])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [task.expected().tokens for task in tasks]
    return outputs


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Little room in a step; commits stop at the ends of pages."""
    tight = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 50}
    tight["prefix_cache_retention_interval"] = PAGE
    with running_engine(CHECKPOINT, **tight, **STATISTICS) as llm:
        yield llm
        assert_idle(llm)


BATCH = [
    Task(random_prompt(1), 16),
    Task(random_prompt(130), 40),
    Task(random_prompt(17), 33, width=8),
    Task(random_prompt(5), 20, width=1, steps=1),
    Task(random_prompt(70), 50, width=13, steps=4, threshold=0.5),
    Task(random_prompt(2), 48, steps=3, threshold=1.0),
    Task(random_prompt(40), 7, width=5, threshold=0.3),
    Task(random_prompt(PAGE - 9), 40),
    Task(random_prompt(2 * PAGE - 10), 40, width=10),
]


def test_one_request(llm: LLM) -> None:
    task = Task((5, 6, 7), 40)
    with counted(llm) as count:
        run(llm, [task])
    count.check_blocks([task])
    count.check_passes([task])
    count.check_worker()
    assert count.grew[COMMITTED_TOKENS] == 48
    assert count.grew[CONTEXT_PASSES] == 1 + 2


def test_batch(llm: LLM) -> None:
    with counted(llm) as count:
        run(llm, BATCH)
    count.check_blocks(BATCH)
    count.check_passes(BATCH)
    count.check_worker()


def test_long_prompts(llm: LLM) -> None:
    """They leave room for every canvas, and a block is never scheduled in part."""
    tasks = [Task(random_prompt(length), 40) for length in (400, 17, 9, 300, 1, 2)]
    with counted(llm) as count:
        outputs = run(llm, tasks)
    assert count.ran["idle rows"] == 0
    assert count.ran["further passes"] > 0
    count.check_blocks(tasks)
    count.check_passes(tasks)
    count.check_worker()
    for task, output in zip(tasks, outputs, strict=True):
        assert sum(output.outputs[0].spec_decode_metrics.histogram) == task.expected().nfe


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_forced_blocks(llm: LLM, steps: int) -> None:
    """With threshold 1 each block takes all its steps, with a low one only some do."""
    strict = Task(random_prompt(9), 64, steps=steps, threshold=1.0)
    with counted(llm) as count:
        run(llm, [strict])
    count.check_blocks([strict])
    assert count.grew[FORCED_BLOCKS] == count.grew[BLOCKS] == 4

    mild = [Task(random_prompt(9, seed), 64, steps=steps, threshold=0.2) for seed in range(6)]
    with counted(llm) as count:
        run(llm, mild)
    count.check_blocks(mild)


@pytest.mark.parametrize("length", [1, 2, 40, 64, 65, 129])
def test_autoregressive(llm: LLM, length: int) -> None:
    """Alone, a prompt is read in chunks of 64 tokens."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=10, extra_args={"diffusion_mode": "ar"})
    llm.reset_prefix_cache()
    with counted(llm) as count:
        [output] = generate(llm, [random_prompt(length)], [params])
    assert len(output.outputs[0].token_ids) == 10
    assert output.outputs[0].spec_decode_metrics is None
    assert count.grew[CONTEXT_PASSES] == count.ran["context passes"] == -(-length // 64) + 9
    assert not any(value for name, value in count.grew.items() if name != CONTEXT_PASSES)


def test_mixed_modes(llm: LLM) -> None:
    params = [task.params() for task in BATCH]
    prompts = [task.prompt for task in BATCH]
    for length in (1, 90, 3):
        prompts.append(random_prompt(length))
        params.append(
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=30, extra_args={"diffusion_mode": "ar"})
        )
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    with counted(llm) as count:
        generate(llm, [prompts[i] for i in order], [params[i] for i in order])
    count.check_blocks(BATCH)
    count.check_passes(BATCH)
    count.check_worker()


def test_per_request(llm: LLM) -> None:
    """NFE, tokens of whole blocks, and the ordered passes."""
    for task, output in zip(BATCH, run(llm, BATCH), strict=True):
        metrics, expected = output.outputs[0].spec_decode_metrics, task.expected()
        accepted = [tokens for block in expected.blocks for tokens in [0] * (len(block) - 1) + [task.width]]
        assert metrics.per_step_accepted == accepted
        assert metrics.per_step_drafted == [task.width] * expected.nfe
        assert metrics.histogram == [accepted.count(n) for n in range(17)]
        over_http = metrics.to_dict()
        assert over_http["num_spec_steps"] == expected.nfe
        assert over_http["num_accepted_draft_tokens"] == task.width * len(expected.blocks)
        assert over_http["num_draft_tokens"] == task.width * expected.nfe


def test_every_completion_of_a_request_has_its_own(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=32, ignore_eos=True)
    with counted(llm) as count:
        [output] = generate(llm, [random_prompt(4)], [params])
    passes = [sum(completion.spec_decode_metrics.histogram) for completion in output.outputs]
    assert sum(passes) == count.grew[DENOISING_STEPS]
    assert all(completion.spec_decode_metrics.histogram[16] == 2 for completion in output.outputs)


def test_prompt_logprobs_come_with_the_first_block(llm: LLM) -> None:
    prompt = random_prompt(70)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=20, prompt_logprobs=1)
    [output] = generate(llm, [prompt], [params])
    assert output.prompt_logprobs[0] is None
    assert all(token in scores for token, scores in zip(prompt[1:], output.prompt_logprobs[1:], strict=True))
    scheduler = core(llm).scheduler
    assert not scheduler._held_scores


def test_aborted_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborts between steps and, as clients of a server do it, while a step runs: its rows were run and are counted."""
    engine, engine_core = llm.llm_engine, core(llm)
    scheduler = engine_core.scheduler
    with counted(llm) as count:
        for i in range(12):
            mode = ("mask_diffusion", "mask_diffusion", "ar")[i % 3]
            params = SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=60, extra_args={"diffusion_mode": mode}, prompt_logprobs=0
            )
            engine.add_request(f"{i}", {"prompt_token_ids": list(random_prompt(3 + 11 * i))}, params)
        rng = random.Random(0)
        while engine.has_unfinished_requests():
            victim = rng.choice(list(scheduler.requests))
            name = victim.rpartition("-")[0]  # inside the engine vLLM appends to a request's name
            while_running = rng.random() < 0.5
            if rng.random() < 0.3:
                if while_running:
                    monkeypatch.setattr(
                        engine_core,
                        "_process_aborts_queue",
                        lambda ids=victim: scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED),
                    )
                else:
                    engine.abort_request([name])
            engine.step()
            if while_running:
                monkeypatch.undo()
                if victim not in scheduler.requests:
                    engine.abort_request([name])
        engine.step()  # the worker forgets the last one
    count.check_worker()
    assert not scheduler._held_scores
    run(llm, BATCH[:1])


def test_documented(llm: LLM) -> None:
    """docs/metrics.md lists every metric with its type and the words of the code."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    documented = {row[0]: (row[1], row[3]) for row in rows if len(row) == 4 and row[0].startswith("vllm:")}
    registered = {
        metric.name: (metric.type, metric.documentation)
        for metric in prometheus_client.REGISTRY.collect()
        if metric.name.startswith(("vllm:diffusion", "vllm:twotower"))
    }
    assert registered.keys() >= HELP.keys()
    assert documented == registered


def test_preemption() -> None:
    """A request that is thrown out starts its block again; the passes it had were passes, but are in no block."""
    page = 64 << 10  # 128 tokens of keys and values, or one state, of this checkpoint
    few_pages = {"max_model_len": 256, "kv_cache_memory_bytes": 12 * page}
    tasks = [Task(random_prompt(95 + 3 * i, i), 60) for i in range(8)]
    one_pass = {"denoise_steps_per_engine_step": 1}  # so that steps end within blocks
    with running_engine(CHECKPOINT, one_pass, **few_pages, **STATISTICS) as llm:
        with counted(llm) as count:
            outputs = run(llm, tasks)
        count.check_blocks(tasks)
        count.check_worker()
        passes = sum(sum(output.outputs[0].spec_decode_metrics.histogram) for output in outputs)
        assert count.grew[DENOISING_STEPS] == passes > sum(task.expected().nfe for task in tasks)
        assert_idle(llm)


def test_max_model_len_cuts_the_last_canvas() -> None:
    with running_engine(CHECKPOINT, max_model_len=64, **STATISTICS) as llm, counted(llm) as count:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=100)
        generate(llm, [random_prompt(length) for length in (17, 31, 32, 48, 63)], [params] * 5)
    count.check_worker()
    assert count.grew[COMMITTED_TOKENS] == sum(64 - length for length in (17, 31, 32, 48, 63))
    assert count.grew[BLOCKS] == 3 + 3 + 2 + 1 + 1
