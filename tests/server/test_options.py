"""Every option of a request over HTTP, in OpenAI's client's words, in every mode: the oracle's answer."""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import golden_data
import pytest
from answers import (
    EOS,
    Answer,
    assert_prompt_logprobs,
    assert_same,
    chat_arguments,
    completion_arguments,
    expected_answers,
    of_chat,
    of_completion,
)
from oracle import expected
from random_requests import RandomRequest, draw_request
from serving import Server
from vllm import SamplingParams
from vllm.tokenizers import TokenizerLike, get_tokenizer

from vllm_twotower.reference import TwoTowerModel

TEXT = "Count: 10 and on"
MODES = ("mask_diffusion", "ar")
BASE: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "seed": 0}
HOT = {"temperature": 1.3, "seed": 7}
WORDS = {a + b for a in string.printable[:94] for b in string.printable[:94]}
NOISE = {"diffusion_strategy": "predict_and_noise"}

# Options by the name of the one that is tried; a function makes them from the answer without any.
OPTIONS: dict[str, Mapping[str, Any] | Callable[[Answer], Mapping[str, Any]]] = {
    "temperature": HOT,
    "seed": HOT,
    "top_p": {**HOT, "top_p": 0.5},
    "top_k": {**HOT, "top_k": 2},
    "min_p": {**HOT, "min_p": 0.3},
    "n": {**HOT, "n": 3},
    "max_tokens": {"max_tokens": 17},
    "logit_bias": {"logit_bias": {5: 3.5, 60: 100, 7: -100}},
    "presence_penalty": {"presence_penalty": 2},
    "frequency_penalty": {"frequency_penalty": 2},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 300, 7))},
    "bad_words": lambda plain: {"bad_words": sorted({plain.text[i : i + 2] for i in range(18)} & WORDS)},
    "min_tokens": {"logit_bias": {2: 100}, "min_tokens": 5},
    "ignore_eos": {"logit_bias": {2: 100}, "ignore_eos": True},
    "stop": lambda plain: {"stop": [plain.text[3], "never said"]},
    "include_stop_str_in_output": lambda plain: {"stop": plain.text[3:5], "include_stop_str_in_output": True},
    "stop_token_ids": lambda plain: {"stop_token_ids": [plain.token_ids[-3], 319]},
    "skip_special_tokens": {"logit_bias": {1: 100}, "skip_special_tokens": False},
    "logprobs": {"logprobs": 3},
    "logprobs=0": {"logprobs": 0, **HOT},
    "logprob_token_ids": {"logprob_token_ids": [5, 3, 319]},
}
BLOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "diffusion_confidence_threshold": {"diffusion_confidence_threshold": 0.3},
    "diffusion_max_steps": {"diffusion_max_steps": 3},
    "diffusion_canvas_length": {"diffusion_canvas_length": 5},
    "diffusion_strategy": {"diffusion_strategy": "posterior"},
    "diffusion_noise_schedule": {**NOISE, "diffusion_noise_schedule": "cosine"},
    "diffusion_adaptive_unmasking": {**NOISE, "diffusion_adaptive_unmasking": True, "diffusion_max_steps": 5},
    "diffusion_remasking": {**NOISE, "diffusion_remasking": "random"},
}
BLOCK_CASES = [("mask_diffusion", name) for name in BLOCK_OPTIONS]
CASES = [(mode, name) for mode in MODES for name in OPTIONS] + BLOCK_CASES
CHATS = [(MODES[i % 2], name) for i, name in enumerate(OPTIONS)] + BLOCK_CASES


@cache
def tokens_of_text() -> list[int]:
    return get_tokenizer(golden_data.checkpoint("A")).encode(TEXT)


class Expectations:
    """What the oracle says of :data:`TEXT` with the options of a case."""

    def __init__(self, model: TwoTowerModel, tokenizer: TokenizerLike):
        self._model, self._tokenizer = model, tokenizer
        self._known: dict[str, list[Answer]] = {}

    def of(self, options: Mapping[str, Any]) -> list[Answer]:
        key = json.dumps(options)
        if key not in self._known:
            self._known[key] = expected_answers(self._model, self._tokenizer, tokens_of_text(), options)
        return self._known[key]

    def options(self, mode: str, name: str) -> dict[str, Any]:
        """The options of a case; what it tries changes what is expected, else the case tries nothing."""
        base = {**BASE, "extra_args": {"diffusion_mode": mode}}
        if name in BLOCK_OPTIONS:
            tried = {**base["extra_args"], **BLOCK_OPTIONS[name]}
            options = {**base, "extra_args": tried}
            without = {**base, "extra_args": {key: value for key, value in tried.items() if key != name}}
        else:
            case = OPTIONS[name]
            case = case(self.of(base)[0]) if callable(case) else case
            options = {**base, **case}
            name = name.partition("=")[0]
            without = {**base, **{key: value for key, value in case.items() if key != name}}
        assert self.of(options) != self.of(without)
        return options


@pytest.fixture(scope="module")
def expectations(oracle: TwoTowerModel, tokenizer: TokenizerLike) -> Expectations:
    return Expectations(oracle, tokenizer)


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_completion(server: Server, expectations: Expectations, mode: str, name: str) -> None:
    options = expectations.options(mode, name)
    arguments = completion_arguments(tokens_of_text(), options)
    completion = server.openai.completions.create(model=server.model, **arguments)
    got = [of_completion(choice) for choice in completion.choices]
    assert_same(got, expectations.of(options))
    assert completion.choices[0].prompt_token_ids == tokens_of_text()
    assert completion.usage.completion_tokens == sum(len(answer.token_ids) for answer in got)


@pytest.mark.parametrize(("mode", "name"), CHATS)
def test_chat(server: Server, expectations: Expectations, mode: str, name: str) -> None:
    options = expectations.options(mode, name)
    chat = server.openai.chat.completions.create(model=server.model, **chat_arguments(TEXT, options))
    want = [answer.in_a_chat(options.get("logprobs")) for answer in expectations.of(options)]
    assert_same([of_chat(choice) for choice in chat.choices], want)
    assert chat.prompt_token_ids == tokens_of_text()


@pytest.mark.parametrize("mode", MODES)
def test_prompt_logprobs(server: Server, oracle: TwoTowerModel, mode: str) -> None:
    options = {**BASE, "extra_args": {"diffusion_mode": mode}, "prompt_logprobs": 2}
    prompt = tokens_of_text()
    [choice] = server.openai.completions.create(model=server.model, **completion_arguments(prompt, options)).choices
    assert_prompt_logprobs(choice.prompt_logprobs, oracle, prompt, 2)
    chat = server.openai.chat.completions.create(model=server.model, **chat_arguments(TEXT, options))
    assert_prompt_logprobs(chat.prompt_logprobs, oracle, prompt, 2)


async def ask_all(server: Server, texts: list[str], drawn: list[RandomRequest]) -> list[list[Answer]]:
    """Answers to all requests at once; ``texts`` are the chats, which come first."""
    async with server.async_openai() as api:

        async def ask(index: int, request: RandomRequest) -> list[Answer]:
            if index < len(texts):
                arguments = chat_arguments(texts[index], request.options)
                response = await api.chat.completions.create(model=server.model, **arguments)
                return [of_chat(choice) for choice in response.choices]
            arguments = completion_arguments(request.prompt, request.options)
            response = await api.completions.create(model=server.model, **arguments)
            return [of_completion(choice) for choice in response.choices]

        return await asyncio.gather(*(ask(i, request) for i, request in enumerate(drawn)))


def test_random_requests_at_once(server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike) -> None:
    """Sixty requests with every option mixed, a third of them chats, nearly half of which wait for the others."""
    rng = random.Random(8)
    drawn = [draw_request(rng, max_tokens=30) for _ in range(60)]
    texts = ["".join(rng.choices("abcdefghij 0123+-=?", k=rng.randint(1, 40))) for _ in range(20)]
    for text, request in zip(texts, drawn, strict=False):
        request.prompt = tokenizer.encode(text)
    answers = asyncio.run(ask_all(server, texts, drawn))
    for index, (request, got) in enumerate(zip(drawn, answers, strict=True)):
        want = expected_answers(oracle, tokenizer, request.prompt, request.options)
        if index < len(texts):
            want = [answer.in_a_chat(request.options.get("logprobs")) for answer in want]
        assert_same(got, want)


# Grammars; tests/server/test_chat.py has those that a trained model follows


def test_grammar_picks_the_best_token_it_allows(
    server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike
) -> None:
    """The grammar's letters, one token each, as if only their tokens were allowed; then EOS, which alone is left.

    As in vLLM, log-probabilities are those among the tokens that the grammar allows.
    """
    prompt, letters = tokens_of_text(), [tokenizer.encode(letter)[0] for letter in "bdg"]
    options = {**BASE, "extra_args": {"diffusion_mode": "ar"}, "max_tokens": 12, "logprobs": 2}
    as_if = {**options, "allowed_token_ids": letters}
    [want] = expected_answers(oracle, tokenizer, prompt, as_if, logprobs_mode="processed_logprobs")

    def answer(pattern: str) -> Answer:
        arguments = completion_arguments(prompt, {**options, "structured_outputs": {"regex": pattern}})
        return of_completion(server.openai.completions.create(model=server.model, **arguments).choices[0])

    assert_same([answer("[bdg]{12}")], [want])
    short = answer("[bdg]{5}")
    assert (short.token_ids, short.text) == (want.token_ids[:5] + [EOS], want.text[:5])
    assert (short.finish_reason, short.stop_reason) == ("stop", None)


def test_grammars_beside_others(server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike) -> None:
    """Requests with grammars of their own and requests without, of all modes in one batch: to each its own mask."""
    prompt, alphabets = tokens_of_text(), ("bdg", "fhj", "", "kmq", "", "vwy", "", "")
    cases = []
    for i, letters in enumerate(alphabets * 2):
        mode = "ar" if letters else MODES[i % 2]
        options = {**BASE, "max_tokens": 60, "ignore_eos": True, "extra_args": {"diffusion_mode": mode}}
        as_if, asked = dict(options), dict(options)
        if letters:
            as_if["allowed_token_ids"] = [tokenizer.encode(letter)[0] for letter in letters]
            asked["structured_outputs"] = {"regex": f"[{letters}]{{60}}"}
        cases.append((asked, as_if))

    async def ask() -> list[Any]:
        async with server.async_openai() as api:
            create = api.completions.create
            return await asyncio.gather(
                *(create(model=server.model, **completion_arguments(prompt, asked)) for asked, _ in cases)
            )

    for (_, as_if), completion in zip(cases, asyncio.run(ask()), strict=True):
        want = expected_answers(oracle, tokenizer, prompt, as_if)
        assert_same([of_completion(choice) for choice in completion.choices], want)


# Beam search


def beams(model: TwoTowerModel, prompt: list[int], width: int, max_tokens: int) -> list[list[int]]:
    """The tokens of vLLM's beam search, which asks for one token of every beam at a time, best first.

    vLLM asks without ``vllm_xargs``, so each token is the first one of a block that the denoiser fills.
    """
    alive, done = [(0.0, [])], []
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * width)
    for _ in range(max_tokens):
        candidates = []
        for score, tokens in alive:
            [token] = expected(model, [*prompt, *tokens], params).tokens
            for other, logprob in token.top:
                if other == EOS:
                    done.append((score + logprob, tokens))
                else:
                    candidates.append((score + logprob, [*tokens, other]))
        alive = sorted(candidates, reverse=True)[:width]
    return [tokens for _, tokens in sorted(done + alive, key=lambda x: -x[0] / (len(prompt) + len(x[1])))][:width]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_beam_search(server: Server, oracle: TwoTowerModel, width: int) -> None:
    prompt = tokens_of_text()
    extra = {"use_beam_search": True, "return_token_ids": True}
    completion = server.openai.completions.create(
        model=server.model, prompt=prompt, max_tokens=5, temperature=0, n=width, extra_body=extra
    )
    assert [choice.token_ids for choice in completion.choices] == beams(oracle, prompt, width, 5)


def test_beam_search_takes_no_diffusion_options(server: Server) -> None:
    """vLLM would drop them: a beam search in another mode than the one asked for."""
    fields = {"use_beam_search": True, "n": 2, "max_tokens": 5, "vllm_xargs": {"diffusion_mode": "ar"}}
    for response in (
        server.post("/v1/completions", prompt=tokens_of_text(), **fields),
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], **fields),
    ):
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert all(word in message for word in ("vllm_xargs", "{'diffusion_mode': 'ar'}", "use_beam_search")), message
