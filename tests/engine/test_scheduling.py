"""Tokens do not depend on how vLLM schedules: budget, preemption, partial canvases, length limit, aborts, slots."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import golden_data
import pytest
from engines import assert_idle, core, generate, run_all, running_engine, tokens_of, traced
from vllm import LLM, SamplingParams

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

CHECKPOINT = golden_data.checkpoint("A")
GREEDY = {"temperature": 0, "ignore_eos": True}


@cache
def oracle() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(CHECKPOINT)


def random_prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(4, 320), k=length)


@cache
def expected(prompt: tuple[int, ...], max_tokens: int, mode: str = "mask_diffusion") -> tuple[int, ...]:
    run = generate_ar if mode == "ar" else generate_mask_diffusion
    return tuple(run(oracle(), prompt, max_tokens).tokens)


def params(max_tokens: int, mode: str = "mask_diffusion") -> SamplingParams:
    return SamplingParams(**GREEDY, max_tokens=max_tokens, extra_args={"diffusion_mode": mode})


@pytest.fixture(scope="module")
def tight() -> Iterator[LLM]:
    """Prompts are read in chunks of at most 50 tokens, four requests run at once, and the canvases fill a step."""
    with running_engine(
        CHECKPOINT,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=50,
    ) as llm:
        yield llm
        assert_idle(llm)


def test_chunked_prefill(tight: LLM) -> None:
    runs = golden_data.diffusion_runs("A")
    random.Random(3).shuffle(runs)
    assert run_all(tight, runs) == [run.tokens for run in runs]


def test_long_prompts_leave_room_for_canvases(tight: LLM) -> None:
    """Blocks come first in a step's budget, and no canvas is scheduled in part."""
    prompts = [tuple(random_prompt(length, length)) for length in (400, 17, 9, 300, 1, 2)]
    modes = ["mask_diffusion", "mask_diffusion", "ar", "mask_diffusion", "ar", "mask_diffusion"]
    with traced(tight) as trace:
        outputs = generate(tight, prompts, [params(40, mode) for mode in modes])
    assert tokens_of(outputs) == [expected(p, 40, mode) for p, mode in zip(prompts, modes, strict=True)]
    assert trace.partial == 0


def test_every_max_tokens(tight: LLM) -> None:
    prompt = tuple(random_prompt(11, 0))
    outputs = generate(tight, [prompt] * 50, [params(n) for n in range(1, 51)])
    whole = expected(prompt, 50)
    assert tokens_of(outputs) == [whole[:n] for n in range(1, 51)]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_aborted_requests_leave_nothing(tight: LLM) -> None:
    """Requests aborted after any number of steps do not disturb the others, nor those that get their slots."""
    engine = tight.llm_engine
    prompts = [tuple(random_prompt(5 + 7 * i, i)) for i in range(24)]
    aborted = {f"abort-{i}": i for i in range(0, 24, 2)}
    outputs = {}
    for i, prompt in enumerate(prompts):
        name = f"abort-{i}" if i % 2 == 0 else f"keep-{i}"
        mode = "ar" if i % 3 == 0 else "mask_diffusion"
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, params(40, mode))
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        for name in [name for name, i in aborted.items() if 3 * i < steps]:
            engine.abort_request([name])
            del aborted[name]
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = output
    for i, prompt in enumerate(prompts):
        if i % 2:
            mode = "ar" if i % 3 == 0 else "mask_diffusion"
            assert tokens_of([outputs[f"keep-{i}"]]) == [expected(prompt, 40, mode)]
    assert_idle(tight)


def test_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few pages requests are thrown out in the middle of a block and start it again."""
    page = 64 << 10  # 128 tokens of keys and values, or one state, of this checkpoint
    with running_engine(CHECKPOINT, max_model_len=256, kv_cache_memory_bytes=14 * page) as llm:
        scheduler, preempted = core(llm).scheduler, []
        preempt = scheduler._preempt_request

        def count(request, *args, **kwargs):
            preempted.append(request)
            return preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler, "_preempt_request", count)
        prompts = [tuple(random_prompt(95 + 3 * i, i)) for i in range(8)]
        modes = ["mask_diffusion", "ar"] * 4
        outputs = generate(llm, prompts, [params(60, mode) for mode in modes])
        assert tokens_of(outputs) == [expected(p, 60, mode) for p, mode in zip(prompts, modes, strict=True)]
        assert preempted
        assert_idle(llm)


def test_max_model_len_cuts_the_last_canvas() -> None:
    """Near the limit a canvas is as wide as the room left, and the request ends at the limit."""
    with running_engine(CHECKPOINT, max_model_len=64) as llm:
        prompts = [tuple(random_prompt(length, 7)) for length in (17, 31, 32, 48, 63)]
        outputs = generate(llm, prompts, [params(100)] * len(prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            whole = (64 - len(prompt)) // 16 * 16
            tokens = list(expected(prompt, whole))
            if rest := 64 - len(prompt) - whole:
                tokens += generate_mask_diffusion(oracle(), [*prompt, *tokens], rest, block_size=rest).tokens
            assert tokens_of([output]) == [tuple(tokens)]
            assert output.outputs[0].finish_reason == "length"
        [output] = generate(llm, [prompts[0]], [params(100, "ar")])
        assert tokens_of([output]) == [expected(prompts[0], 47, "ar")]
        assert_idle(llm)


def test_budget_below_one_canvas_each_is_raised() -> None:
    runs = golden_data.diffusion_runs("A")[:4]
    with running_engine(CHECKPOINT, max_num_seqs=4, max_num_batched_tokens=33) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 64
        assert run_all(llm, runs) == [run.tokens for run in runs]


def test_one_mamba_state_a_request() -> None:
    """A request holds one state per Mamba layer and the pages of its tokens, nothing for its draft tokens."""
    run = golden_data.diffusion_runs("A")[0]
    with running_engine(CHECKPOINT) as llm:
        manager = core(llm).scheduler.kv_cache_manager
        engine = llm.llm_engine
        engine.add_request("one", {"prompt_token_ids": list(run.prompt)}, run.params())
        engine.step()
        [request] = core(llm).scheduler.running
        groups = [len(ids) for ids in manager.get_block_ids(request.request_id)]
        assert groups == [1, 1, 1]  # two Mamba layers, one group of attention pages
        engine.abort_request(["one"])
        while engine.has_unfinished_requests():
            engine.step()
