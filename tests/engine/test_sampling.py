"""Draws, log-probabilities and batch independence, with every option mixed, against the oracle; one engine."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache

import golden_data
import numpy as np
import pytest
import torch
from comparisons import assert_logprobs, assert_prompt_logprobs, assert_same, model
from engines import assert_idle, generate, running_engine, tokens_of
from oracle import expected
from random_requests import RandomRequest, draw_prompt, draw_request
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.outputs import LogprobsTensors

from vllm_twotower.engine.request_table import RequestTable
from vllm_twotower.options import EngineOptions
from vllm_twotower.reference import generate_mask_diffusion
from vllm_twotower.sampling.strategies import NOISE_SCHEDULES

CHECKPOINT = golden_data.checkpoint("A")


@cache
def requests() -> list[RandomRequest]:
    """Sixty-four requests that each fix their random numbers."""
    rng = random.Random(2)
    return [draw_request(rng) for _ in range(64)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(CHECKPOINT, max_num_seqs=64, max_num_batched_tokens=2048) as llm:
        yield llm
        assert_idle(llm)


@pytest.fixture(scope="module")
def together(llm: LLM) -> list[RequestOutput]:
    return run(llm, requests())


def run(llm: LLM, drawn: Sequence[RandomRequest]) -> list[RequestOutput]:
    return generate(llm, [r.prompt for r in drawn], [r.params() for r in drawn])


def test_every_option_equals_the_oracle(llm: LLM, together: list[RequestOutput]) -> None:
    modes, asked = set(), set()
    for request, output in zip(requests()[::2], together[::2], strict=True):
        params = request.params(llm.get_tokenizer())
        [completion] = output.outputs
        want = expected(model(), request.prompt, params)
        assert list(completion.token_ids) == want.token_ids, request
        assert completion.finish_reason == want.finish_reason
        if params.logprobs is not None:
            assert_logprobs(completion.logprobs, want)
        if params.prompt_logprobs is not None:
            assert_prompt_logprobs(output, request.prompt)
        modes.add(request.mode)
        asked |= request.options.keys()
    assert modes == {"mask_diffusion", "ar", "verified"}
    assert asked >= {"logprobs", "prompt_logprobs", "bad_words", "logit_bias", "allowed_token_ids", "min_tokens"}


def test_alone_as_in_a_batch(llm: LLM, together: list[RequestOutput]) -> None:
    alone = [output for request in requests()[::2] for output in run(llm, [request])]
    assert_same(alone, together[::2])


def test_shuffled_as_in_order(llm: LLM, together: list[RequestOutput]) -> None:
    order = list(range(len(requests())))
    random.Random(2).shuffle(order)
    shuffled = run(llm, [requests()[i] for i in order])
    assert_same(shuffled, [together[i] for i in order])


def test_engine_seed_repeats_requests_without_one() -> None:
    """As in vLLM, an offline run can be repeated, and with another seed its draws are others."""
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    ids = ("0-1a2b3c4d", "0-5e6f7a8b", "1-1a2b3c4d")  # the first two are one request in two runs
    seeds = []
    for seed in (0, 7):
        table = RequestTable(3, 256, EngineOptions(seed=seed), 320, torch.device("cpu"))
        for slot, name in enumerate(ids):
            table.add(slot, name, params)
        seeds.append(table.options.seed.tolist()[: len(ids)])
    assert all(first == again != other for first, again, other in seeds)
    assert seeds[0][0] != seeds[1][0]


def test_several_completions_have_seeds_of_their_own(llm: LLM) -> None:
    """With n > 1 completion i is that of the request with the seed plus i."""
    params = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    [many] = generate(llm, [[5, 6, 7]], [SamplingParams(**params, seed=5, n=3)])
    alone = generate(llm, [[5, 6, 7]] * 3, [SamplingParams(**params, seed=5 + i) for i in range(3)])
    assert [tuple(c.token_ids) for c in many.outputs] == tokens_of(alone)
    assert len(set(tokens_of(alone))) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_steps_than_positions(llm: LLM, temperature: float) -> None:
    """32 passes for a block of 16, as in NVIDIA's examples: schedules are finer, every pass still commits."""
    noise, posterior = {"diffusion_strategy": "predict_and_noise"}, {"diffusion_strategy": "posterior"}
    options = [
        {"diffusion_confidence_threshold": 1.0},
        {"diffusion_confidence_threshold": 0.3},
        *(noise | {"diffusion_noise_schedule": name} for name in NOISE_SCHEDULES),
        *(posterior | {"diffusion_noise_schedule": name} for name in NOISE_SCHEDULES),
        noise | {"diffusion_adaptive_unmasking": True},
        noise | {"diffusion_remasking": "random"},
    ]
    prompt, common = [5, 60, 7, 200, 31], {"seed": 1, "max_tokens": 40, "ignore_eos": True}
    params = [
        SamplingParams(temperature=temperature, extra_args=extra | {"diffusion_max_steps": 32}, **common)
        for extra in options
    ]
    outputs = tokens_of(generate(llm, [prompt] * len(params), params))
    for param, tokens in zip(params, outputs, strict=True):
        assert list(tokens) == expected(model(), prompt, param).token_ids, param.extra_args
    if temperature == 0:
        for gamma, tokens in zip((1.0, 0.3), outputs, strict=False):
            assert list(tokens) == generate_mask_diffusion(model(), prompt, 40, steps=32, gamma=gamma).tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_first_pass_draws_from_the_reference_distribution(llm: LLM, options: dict) -> None:
    """20,000 draws, 1,250 at each position of a canvas that one pass fills; chi-square at 1 %."""
    draws, prompt, temperature = 1250, [9, 30, 200], 2.0
    params = [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=16,
            ignore_eos=True,
            extra_args={"diffusion_max_steps": 1},
            **options,
        )
        for seed in range(draws)
    ]
    tokens = torch.tensor(tokens_of(generate(llm, [prompt] * draws, params)))
    assert tokens.shape == (draws, 16)

    with torch.inference_mode():
        _, state = model().advance_context(torch.tensor([prompt]), None)
        logits = model().denoiser_logits(torch.full((16,), 3), state, torch.ones(1)).double()
        logits[:, 3] = -torch.inf
        reference = filtered((logits / temperature).softmax(-1), **options)
    statistic = freedom = 0
    for column in range(16):
        counts = torch.bincount(tokens[:, column], minlength=reference.shape[1]).double()
        assert counts[reference[column] == 0].sum() == 0
        want = reference[column] * draws
        common = want >= 5
        cells = [(float(c), float(w)) for c, w in zip(counts[common], want[common], strict=True)]
        cells.append((float(counts[~common].sum()), float(want[~common].sum())))
        cells = [(c, w) for c, w in cells if w >= 5]
        statistic += sum((c - w) ** 2 / w for c, w in cells)
        freedom += len(cells) - 1
    # The 99 % point of chi-square by Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 50
    assert statistic < limit


def filtered(probabilities: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Probabilities (S, V) after one of the filters, by its definition."""
    descending = probabilities.sort(-1, descending=True).values
    keep = probabilities >= min_p * descending[:, :1]
    if top_k:
        keep &= probabilities >= descending[:, top_k - 1 : top_k]
    if top_p < 1:
        before = descending.cumsum(-1) - descending
        smallest = torch.where(before < top_p, descending, 2).amin(-1, keepdim=True)
        keep &= probabilities >= smallest
    kept = probabilities * keep
    return kept / kept.sum(-1, keepdim=True)


def test_no_banned_phrase_comes_out(llm: LLM) -> None:
    """Two- and three-token phrases of the unrestricted output are banned, block by block and across borders."""
    tokenizer, rng = llm.get_tokenizer(), random.Random(3)
    banned = 0
    for _ in range(8):
        prompt = draw_prompt(rng)
        base = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        [free] = tokens_of(generate(llm, [prompt], [base]))
        words = {tokenizer.decode(free[i : i + n]) for i in range(36) for n in (1, 2, 3)}
        words = sorted(w for w in words if w.strip() and w == w.strip() and "\ufffd" not in w)
        if not words:
            continue
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, bad_words=words)
        [output] = generate(llm, [prompt], [params])
        params.update_from_tokenizer(tokenizer)
        tokens = list(output.outputs[0].token_ids)
        for phrase in params.bad_words_token_ids:
            banned += len(phrase) > 1
            assert all(tokens[i : i + len(phrase)] != phrase for i in range(len(tokens)))
        assert tokens == expected(model(), prompt, params).token_ids
    assert banned > 20


def test_prompt_logprobs_of_given_tokens(llm: LLM) -> None:
    prompt, rng = draw_prompt(random.Random(6), (40,)), random.Random(7)
    ids = np.array([rng.sample(range(320), 5) for _ in range(39)])
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprob_token_ids=ids)
    [output] = generate(llm, [prompt], [params])
    with torch.inference_mode():
        logprobs = model().context_logits(torch.tensor([prompt]))[0].log_softmax(-1)
    want = logprobs[:-1].gather(1, torch.from_numpy(ids))
    np.testing.assert_allclose(output.prompt_token_id_logprobs, want.numpy(), atol=1e-4)


def test_nothing_is_sent_for_requests_that_ask_for_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of one request in a batch are not computed for its neighbours."""
    sent = []
    tolists = LogprobsTensors.tolists
    monkeypatch.setattr(
        LogprobsTensors, "tolists", lambda self, *a: sent.append(len(self.logprobs)) or tolists(self, *a)
    )
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1 if i == 3 else None) for i in range(8)
    ]
    generate(llm, [[5, 6, 7 + i] for i in range(8)], params)
    assert sum(sent) == 16


def test_grammars_beside_other_requests(llm: LLM) -> None:
    """Autoregressive requests with a grammar and without, and blocks: each follows its own rules."""
    prompts = [[5, 6, 7 + i] for i in range(12)]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=i % 3 == 0,
            structured_outputs=None if i % 3 == 0 else StructuredOutputsParams(regex=f"[a-c]{{{i}}}[0-9]"),
            extra_args={"diffusion_mode": "ar" if i < 10 or i % 3 else "mask_diffusion"},
        )
        for i in range(12)
    ]
    outputs = generate(llm, prompts, params)
    for i, (prompt, param, output) in enumerate(zip(prompts, params, outputs, strict=True)):
        if i % 3:
            assert re.fullmatch(f"[a-c]{{{i}}}[0-9]", output.outputs[0].text)
        else:
            assert list(output.outputs[0].token_ids) == expected(model(), prompt, param).token_ids
