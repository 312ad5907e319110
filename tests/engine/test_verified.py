"""Mode ``verified``: whatever the denoiser drafts, the text is that of mode ``ar``, token for token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import golden_data
import pytest
from comparisons import assert_same
from engines import assert_idle, core, generate, running_engine, tokens_of
from random_requests import RandomRequest, draw_draft_options, draw_request
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import get_tokenizer

from vllm_twotower.engine.metrics import ACCEPTED_TOKENS, DRAFT_TOKENS

TRAINED = Path(__file__).parents[2] / "models" / "tiny-twotower"
PAGE = 128


@cache
def problems() -> list[list[int]]:
    """Prompts that the trained model was made for; its drafts are mostly right."""
    tokenizer = get_tokenizer(str(TRAINED))
    lines = (TRAINED / "heldout.jsonl").read_text().splitlines()
    return [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


@cache
def drawn(count: int, trained: bool, max_tokens: int = 40) -> list[RandomRequest]:
    """Requests in mode ``ar`` with every option that it has."""
    rng = random.Random(count + trained)
    requests = []
    for i in range(count):
        request = draw_request(rng, max_tokens)
        options = {**request.options, "extra_args": {"diffusion_mode": "ar"}}
        if rng.random() < 0.2:
            # Few tokens to choose from: drafts of a model that was not trained are right in parts.
            options["allowed_token_ids"] = rng.sample(range(4, 40), rng.randint(1, 3))
        prompt = request.prompt
        if trained:
            # Drafts stay good where few rules are in the way.
            prompt = problems()[i % len(problems())] if rng.random() < 0.8 else prompt
            if rng.random() < 0.6:
                kept = ("temperature", "seed", "max_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "extra_args")
                options = {name: value for name, value in options.items() if name in kept}
                if options["temperature"]:
                    options["temperature"] = rng.choice((0.3, 0.7, 1.0, 1.5))
        requests.append(RandomRequest(prompt, options))
    return requests


def drafted(requests: Sequence[RandomRequest], seed: int = 0) -> list[RandomRequest]:
    """The same requests in mode ``verified``, with every option that drafts have."""
    rng = random.Random(seed)

    def options() -> dict[str, Any]:
        return {"diffusion_mode": "verified", **draw_draft_options(rng)}

    return [replace(request, options={**request.options, "extra_args": options()}) for request in requests]


def run(llm: LLM, requests: Sequence[RandomRequest]) -> list[RequestOutput]:
    return generate(llm, [r.prompt for r in requests], [r.params() for r in requests])


def accepted(llm: LLM) -> tuple[float, float]:
    """Tokens that were drafted, and accepted."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    return values[DRAFT_TOKENS].value, values[ACCEPTED_TOKENS].value


TOGETHER = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
ENGINES: dict[str, dict[str, Any]] = {
    "together": TOGETHER,
    "few pages": {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 100,
        "scheduling_policy": "priority",
        "num_gpu_blocks_override": 8,
    },
    "prefix caching": {
        "prefix_cache_retention_interval": PAGE,
        "additional_config": {"twotower": {"denoise_steps_per_engine_step": 1}},
    },
}


@pytest.fixture(scope="module", params=[golden_data.checkpoint("C"), TRAINED], ids=["C", "trained"])
def expected(request: pytest.FixtureRequest) -> tuple[Path, list[RandomRequest], list[RequestOutput]]:
    """A checkpoint, requests, and what mode ``ar`` answers."""
    requests = drawn(30, request.param == TRAINED)
    with running_engine(request.param, max_model_len=256, **TOGETHER) as llm:
        return request.param, requests, run(llm, requests)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_requests(
    expected: tuple[Path, list[RandomRequest], list[RequestOutput]], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled, all at once, in chunks and thrown out again and again, and with states kept at the ends of pages."""
    checkpoint, requests, outputs = expected
    options = {"max_model_len": 256, "disable_log_stats": False, **ENGINES[engine]}
    with running_engine(checkpoint, **options) as llm:
        preempted, scheduler = [], core(llm).scheduler
        preempt = scheduler._preempt_request

        def record(*args: Any, **kwargs: Any) -> Any:
            preempted.append(args)
            return preempt(*args, **kwargs)

        monkeypatch.setattr(scheduler, "_preempt_request", record)
        order = random.Random(3).sample(range(len(requests)), len(requests))
        shuffled = drafted([requests[i] for i in order])
        answered = generate(
            llm,
            [request.prompt for request in shuffled],
            [request.params() for request in shuffled],
            priority=[i % 4 for i in order] if engine == "few pages" else None,
        )
        verified = dict(zip(order, answered, strict=True))
        assert_same([verified[i] for i in range(len(requests))], outputs)
        num_drafted, num_accepted = accepted(llm)
        assert 0.01 * num_drafted < num_accepted < num_drafted
        # The problems' answers hardly need a second page.
        assert bool(preempted) == (engine == "few pages") or checkpoint == TRAINED
        assert_idle(llm)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [*map(golden_data.checkpoint, "ABC"), TRAINED], ids=lambda path: path.name)
def test_five_hundred_requests(checkpoint: Path) -> None:
    """Up to 200 tokens each; alone the first fifty."""
    requests = drawn(500, checkpoint == TRAINED, max_tokens=200)
    with running_engine(checkpoint, **TOGETHER) as llm:
        outputs = run(llm, requests)
        assert_same(run(llm, drafted(requests, 1)), outputs, large=True)
        alone = [run(llm, [request])[0] for request in drafted(requests[:50], 2)]
        assert_same(alone, outputs[:50], large=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options = {"mode": "verified", "draft_steps": 2}
    with running_engine(TRAINED, options, disable_log_stats=False, per_request_spec_decode_metrics="detailed") as llm:
        yield llm
        assert_idle(llm)


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_goldens(name: str) -> None:
    """NVIDIA's own code, token by token."""
    prompts = golden_data.prompts(name)
    with running_engine(golden_data.checkpoint(name), {"mode": "verified"}) as llm:
        for prompt in prompts:
            tokens = tuple(prompt["ar"]["new_ids"])
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(tokens))
            assert tokens_of(generate(llm, [prompt["ids"]], [params])) == [tokens]


def test_what_is_counted(llm: LLM) -> None:
    """Drafts of a request, as speculative decoding has them, and of the engine."""
    before = accepted(llm)
    outputs = generate(llm, problems()[:8], [SamplingParams(temperature=0, max_tokens=64)] * 8)
    found = [output.outputs[0].spec_decode_metrics for output in outputs]
    for output, metrics in zip(outputs, found, strict=True):
        # The prompt gives one token, each draft those of it that were accepted and one more; the last may be cut.
        given = 1 + sum(count + 1 for count in metrics.per_step_accepted)
        assert given - 15 <= len(output.outputs[0].token_ids) <= given
        assert metrics.histogram == [metrics.per_step_accepted.count(n) for n in range(17)]
    grew = [after - one for after, one in zip(accepted(llm), before, strict=True)]
    assert grew == [
        sum(sum(metrics.per_step_drafted) for metrics in found),
        sum(sum(metrics.per_step_accepted) for metrics in found),
    ]


def test_a_grammar_means_token_by_token(llm: LLM) -> None:
    def params(mode: str) -> SamplingParams:
        grammar = StructuredOutputsParams(regex="[0-9]{3} apples( and [0-9]{2} pears){2}")
        extra = {"diffusion_mode": mode}
        return SamplingParams(temperature=0.8, seed=3, max_tokens=40, structured_outputs=grammar, extra_args=extra)

    verified, autoregressive = generate(llm, problems()[:1] * 2, [params("verified"), params("ar")])
    assert_same([verified], [autoregressive])
    assert verified.outputs[0].spec_decode_metrics is None or not sum(verified.outputs[0].spec_decode_metrics.histogram)


def test_several_completions(llm: LLM) -> None:
    def params(mode: str) -> SamplingParams:
        extra = {"diffusion_mode": mode}
        return SamplingParams(temperature=1.5, seed=5, n=3, max_tokens=30, ignore_eos=True, extra_args=extra)

    [verified], [autoregressive] = (generate(llm, problems()[:1], [params(mode)]) for mode in ("verified", "ar"))
    tokens = [tuple(completion.token_ids) for completion in verified.outputs]
    assert tokens == [tuple(completion.token_ids) for completion in autoregressive.outputs]


def test_the_mask_token_may_be_text(llm: LLM) -> None:
    """The context tower may choose it, and the denoiser never drafts it."""
    for allowed in ([3], [3, 90]):
        params = SamplingParams(temperature=1, seed=1, max_tokens=20, ignore_eos=True, allowed_token_ids=allowed)
        autoregressive = SamplingParams(
            temperature=1,
            seed=1,
            max_tokens=20,
            ignore_eos=True,
            allowed_token_ids=allowed,
            extra_args={"diffusion_mode": "ar"},
        )
        outputs = generate(llm, problems()[:1] * 2, [params, autoregressive])
        assert_same(outputs[:1], outputs[1:])
