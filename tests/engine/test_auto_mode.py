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
from vllm_twotower.engine.mode_control import ModeControl, ModeDecision
from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

Filled = dict[str, list[tuple[bool, int]]]
CHECKPOINT = golden_data.checkpoint("A")


@cache
def reference() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(CHECKPOINT)


@cache
def part(context: tuple[int, ...], is_ar: bool, width: int) -> tuple[int, ...]:
    """What follows ``context``, so many tokens from the context tower or a block from the denoiser."""
    if is_ar:
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
def filled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Filled:
    """What each step returned of each request: whether the context tower filled it, and how many tokens."""
    known, made = core(llm).scheduler._known, defaultdict(list)
    count = known.count

    def record(of_rows, *args):
        for name, (_, num_tokens) in of_rows.items():
            if num_tokens and known[name].options.mode == "auto":
                made[name.split("-")[0]].append((known[name].mode == "ar", num_tokens))
        count(of_rows, *args)

    monkeypatch.setattr(known, "count", record)
    return made


def at_random(monkeypatch: pytest.MonkeyPatch, share_of_ar: float) -> None:
    rng = random.Random(0)

    def choose(self, step, num_open, lossless):
        other = "verified" if lossless else "mask_diffusion"
        return ModeDecision("ar" if rng.random() < share_of_ar else other, "at random", {"ar": 1.0, other: 1.0})

    monkeypatch.setattr(ModeControl, "choose", choose)


def test_switches_at_any_border(llm: LLM, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
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
        made, tokens = filled[output.request_id], ()
        for is_ar, count in made:
            assert is_ar or count == width
            tokens += part(prompt + tokens, is_ar, count)
        assert tokens_of([output]) == [tokens[: param.max_tokens]]
        pairs |= {(before, after) for (before, _), (after, _) in zip(made, made[1:], strict=False)}
    assert pairs == {(False, False), (False, True), (True, False), (True, True)}


def test_lossless_text_does_not_depend_on_choices(llm: LLM, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice follows each other, beside requests that may choose mask diffusion."""
    at_random(monkeypatch, 0.5)
    prompts = [random_prompt(1 + 13 * i, i) for i in range(16)]
    lossless = {"diffusion_lossless": True}

    def params(i: int, **extra: object) -> SamplingParams:
        options = {"temperature": 0.0 if i % 2 else 0.9, "seed": i, "allowed_token_ids": [7, 9 + i, 90]}
        return SamplingParams(**options, ignore_eos=True, max_tokens=60 - i, extra_args=extra)

    expected = generate(llm, prompts, [params(i, diffusion_mode="ar") for i in range(16)])
    mixed = [params(i, **(lossless if i < 16 else {})) for i in range(20)]
    outputs = generate(llm, prompts + prompts[:4], mixed)
    assert tokens_of(outputs[:16]) == tokens_of(expected)
    made = [filled[output.request_id] for output in outputs[:16]]
    pairs = {pair for of_one in made for pair in zip(of_one, of_one[1:], strict=False)}
    assert {(before, after) for (before, _), (after, _) in pairs} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert any(count > 1 for of_one in made for is_ar, count in of_one if not is_ar)


def test_text_of_both_modes_is_found(llm: LLM, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A next turn reads the pages that blocks and single tokens filled; these lie across the pages' ends."""
    at_random(monkeypatch, 0.5)
    prompts = [random_prompt(121 - 3 * i, 50 + i) for i in range(8)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)
    outputs = generate(llm, prompts, [params] * len(prompts))
    longer = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = ()
        for is_ar, count in filled[output.request_id]:
            tokens += part(prompt + tokens, is_ar, count)
        assert tokens_of([output]) == [tokens[:60]]
        longer.append(prompt + tokens[:60])
    plain = SamplingParams(temperature=0, ignore_eos=True, max_tokens=16, extra_args={"diffusion_mode": "ar"})
    outputs = generate(llm, longer, [plain] * len(longer))
    assert tokens_of(outputs) == [part(text, True, 16) for text in longer]
    assert [output.num_cached_tokens for output in outputs] == [128] * len(longer)


def test_preempted_requests_go_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests are thrown out again and again; with one mode throughout the tokens are that mode's."""
    scheduler, engine = core(llm).scheduler, llm.llm_engine
    for share, is_ar in ((0.0, False), (1.0, True)):
        at_random(monkeypatch, share)
        prompts = {f"{is_ar}{i}": random_prompt(20 + 9 * i, i) for i in range(4)}
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
                tokens += part(prompt + tokens, is_ar, 16)
            assert tokens_of([outputs[name]]) == [tokens]


def test_the_engine_chooses_and_says_why(llm: LLM, filled: Filled) -> None:
    """With its own choice, the metrics count the choices and give the predictions they rest on."""
    before = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=96)
    counts = (1, 1, 1, 1, 8)
    for count in counts:
        generate(llm, [random_prompt(9, i) for i in range(count)], [params] * count)
    after = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    made = [is_ar for of_request in filled.values() for is_ar, _ in of_request]
    # Every return is followed by a choice, and every request starts with one.
    assert after[AUTO_AR_CHOICES] - before[AUTO_AR_CHOICES] >= sum(made) > 0
    new = sum(after[name] - before[name] for name in (AUTO_AR_CHOICES, AUTO_DIFFUSION_CHOICES))
    assert new == len(made) + sum(counts)
    assert after[AUTO_AR_SECONDS] > 0
    assert after[AUTO_DIFFUSION_SECONDS] > 0


def test_a_grammar_means_token_by_token(llm: LLM, filled: Filled) -> None:
    grammar = StructuredOutputsParams(choice=["ab", "cd"])
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=grammar)
    [output] = generate(llm, [(5, 6, 7)], [params])
    assert output.outputs[0].text in ("ab", "cd")
    assert not filled
