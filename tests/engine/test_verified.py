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
from random_requests import RandomRequest, draw_block_options, draw_request
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import get_tokenizer

from vllm_twotower.engine.metrics import ACCEPTED_PER_DRAFT, ACCEPTED_TOKENS, DRAFT_TOKENS
from vllm_twotower.offline import fastest_dtype

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
            prompt = problems()[i] if rng.random() < 0.8 else prompt
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
        of_block = draw_block_options(rng) if rng.random() < 0.5 else {}
        of_block.pop("diffusion_max_steps", None)
        if of_block.get("diffusion_canvas_length") == 1:
            del of_block["diffusion_canvas_length"]
        if rng.random() < 0.6:
            of_block["diffusion_draft_steps"] = rng.choice((1, 2, 2, 3, 16))
        return {"diffusion_mode": "verified", **of_block}

    return [replace(request, options={**request.options, "extra_args": options()}) for request in requests]


def run(llm: LLM, requests: Sequence[RandomRequest]) -> list[RequestOutput]:
    return generate(llm, [r.prompt for r in requests], [r.params() for r in requests])


def accepted(llm: LLM) -> tuple[float, float]:
    """Tokens that were drafted, and accepted."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    return values[DRAFT_TOKENS].value, values[ACCEPTED_TOKENS].value


ENGINES: dict[str, dict[str, Any]] = {
    "together": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
    "chunked": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
    "preempted": {"max_num_seqs": 16},
    "prefix caching": {"enable_prefix_caching": True, "prefix_cache_retention_interval": PAGE},
    "passes in many steps": {"additional_config": {"twotower": {"denoise_steps_per_engine_step": 1}}},
}


@pytest.fixture(scope="module", params=["A", "B", "C", "trained"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return TRAINED if request.param == "trained" else golden_data.checkpoint(request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[list[RandomRequest], list[RequestOutput]]:
    """Requests and what mode ``ar`` answers."""
    requests = drawn(COUNT, checkpoint == TRAINED)
    with running_engine(checkpoint, max_num_seqs=64, max_num_batched_tokens=2048) as llm:
        return requests, run(llm, requests)


COUNT = 64


@pytest.mark.parametrize("engine", ENGINES)
def test_random_requests(
    checkpoint: Path, expected: tuple[list[RandomRequest], list[RequestOutput]], engine: str
) -> None:
    requests, outputs = expected
    options = {"max_model_len": 256, **ENGINES[engine]}
    if engine == "preempted":
        options["kv_cache_memory_bytes"] = 40 * (256 << 10) if checkpoint == TRAINED else 30 * (64 << 10)
    with running_engine(checkpoint, disable_log_stats=False, **options) as llm:
        preempted = []
        scheduler = core(llm).scheduler
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
        order = random.Random(3).sample(range(COUNT), COUNT)
        verified = dict(zip(order, run(llm, drafted([requests[i] for i in order])), strict=True))
        assert_same([verified[i] for i in range(COUNT)], outputs)
        num_drafted, num_accepted = accepted(llm)
        print(checkpoint.name, engine, num_drafted, num_accepted, len(preempted))
        assert 0.02 * num_drafted < num_accepted < num_drafted
        assert_idle(llm)
