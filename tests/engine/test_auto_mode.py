"""``diffusion_mode: auto``: whatever is chosen at block borders, tokens are those of the plain model in these modes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import golden_data
import pytest
from engines import assert_idle, core, generate, running_engine, tokens_of
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_twotower.engine.metrics import (
    AUTO_AR_CHOICES,
    AUTO_AR_SECONDS,
    AUTO_DIFFUSION_CHOICES,
    AUTO_DIFFUSION_SECONDS,
)
from vllm_twotower.engine.mode_control import ModeControl
from vllm_twotower.planning.mode_choice import ModeDecision
from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

CHECKPOINT = golden_data.checkpoint("A")


@cache
def reference() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(CHECKPOINT)


@cache
def part(context: tuple[int, ...], is_single: bool, width: int) -> tuple[int, ...]:
    """What follows ``context``, as one block or as so many single tokens."""
    if is_single:
        return tuple(generate_ar(reference(), context, width).tokens)
    return tuple(generate_mask_diffusion(reference(), context, width, block_size=width).tokens)


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, 320), k=length))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options = {"mode": "auto"}
    with running_engine(
        CHECKPOINT,
        options,
        max_num_batched_tokens=128,
        disable_log_stats=False,
        prefix_cache_retention_interval=128,
    ) as llm:
        yield llm
        assert_idle(llm)


@pytest.fixture
def choices(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """The choices of each request, in order: whether it went on token by token."""
    scheduler, made = core(llm).scheduler, defaultdict(list)
    choose = scheduler._choose

    def record(row):
        choose(row)
        [name] = [name for name, known in scheduler._rows.items() if known is row]
        made[name.split("-")[0]].append(row.is_single)

    monkeypatch.setattr(scheduler, "_choose", record)
    return made


def at_random(monkeypatch: pytest.MonkeyPatch, share_of_ar: float) -> None:
    rng = random.Random(0)

    def choose(self, step, num_open, context_len):
        return ModeDecision("ar" if rng.random() < share_of_ar else "mask_diffusion", "at random", 1.0, 1.0)

    monkeypatch.setattr(ModeControl, "choose", choose)


def test_switches_at_any_border(llm: LLM, choices: dict[str, list[bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths, some in chunks, beside plain requests of both modes; each choice follows each other."""
    at_random(monkeypatch, 0.5)
    prompts = [random_prompt(1 + 13 * i, i) for i in range(16)]
    widths = [16, 7, 16, 2] * 4
    params = [
        SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=90 - i, extra_args={"diffusion_canvas_length": widths[i]}
        )
        for i in range(16)
    ]
    others = [SamplingParams(temperature=0, max_tokens=40, extra_args={"diffusion_mode": "ar"})]
    outputs = generate(llm, prompts + prompts[:1], params + others)
    pairs = set()
    for prompt, width, param, output in zip(prompts, widths, params, outputs, strict=False):
        made, tokens = choices[output.request_id], ()
        for is_single in made:
            tokens += part(prompt + tokens, is_single, width)
        assert tokens_of([output]) == [tokens[: param.max_tokens]]
        pairs |= set(zip(made, made[1:], strict=False))
    assert pairs == {(False, False), (False, True), (True, False), (True, True)}


def test_text_of_both_modes_is_found(llm: LLM, choices: dict[str, list[bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A next turn reads the pages that blocks and single tokens filled; these lie across the pages' ends."""
    at_random(monkeypatch, 0.5)
    prompts = [random_prompt(121 - 3 * i, 50 + i) for i in range(8)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)
    outputs = generate(llm, prompts, [params] * len(prompts))
    longer = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = ()
        for is_single in choices[output.request_id]:
            tokens += part(prompt + tokens, is_single, 16)
        assert tokens_of([output]) == [tokens[:60]]
        longer.append(prompt + tokens[:60])
    plain = SamplingParams(temperature=0, ignore_eos=True, max_tokens=16, extra_args={"diffusion_mode": "ar"})
    outputs = generate(llm, longer, [plain] * len(longer))
    assert tokens_of(outputs) == [part(text, True, 16) for text in longer]
    assert [output.num_cached_tokens for output in outputs] == [128] * len(longer)


def test_preempted_requests_go_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests are thrown out again and again; with one mode throughout the tokens are that mode's."""
    scheduler, engine = core(llm).scheduler, llm.llm_engine
    for share, single in ((0.0, False), (1.0, True)):
        at_random(monkeypatch, share)
        prompts = {f"{single}{i}": random_prompt(20 + 9 * i, i) for i in range(4)}
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=48)
        for name, prompt in prompts.items():
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        outputs, steps = {}, 0
        while engine.has_unfinished_requests():
            steps += 1
            if steps % 7 == 0:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            outputs |= {output.request_id: output for output in engine.step() if output.finished}
        for name, prompt in prompts.items():
            tokens = ()
            for _ in range(3):
                tokens += part(prompt + tokens, single, 16)
            assert tokens_of([outputs[name]]) == [tokens]


def test_the_engine_chooses_and_says_why(llm: LLM, choices: dict[str, list[bool]]) -> None:
    """With its own choice, the metrics count the choices and give the predictions they rest on."""
    before = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=96)
    for count in (1, 8):
        generate(llm, [random_prompt(9, i) for i in range(count)], [params] * count)
    after = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    made = [is_single for of_request in choices.values() for is_single in of_request]
    assert after[AUTO_AR_CHOICES] - before[AUTO_AR_CHOICES] == sum(made)
    assert after[AUTO_DIFFUSION_CHOICES] - before[AUTO_DIFFUSION_CHOICES] == len(made) - sum(made)
    assert after[AUTO_AR_SECONDS] > 0
    assert after[AUTO_DIFFUSION_SECONDS] > 0


def test_a_grammar_means_token_by_token(llm: LLM, choices: dict[str, list[bool]]) -> None:
    grammar = StructuredOutputsParams(choice=["ab", "cd"])
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=grammar)
    [output] = generate(llm, [(5, 6, 7)], [params])
    assert output.outputs[0].text in ("ab", "cd")
    assert not choices
