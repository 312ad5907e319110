"""Random request bodies, sound, wrong and senseless: exact answers, refusals that name the field, never an error 500.

Left out is what vLLM itself answers with an error 500, whatever the model:

- ``structured_outputs`` that is no object: `CompletionRequest.check_structured_outputs_count` calls its ``get``;
- lone surrogates in ``request_id`` and ``session_id``: they cannot be sent to the engine;
- ``stop_token_ids`` with every token that a grammar allows: xgrammar takes them for the grammar's ends.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import golden_data
import httpx
import pytest
from answers import answers_in, assert_same, completion_body, expected_answers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_requests import RandomRequest, draw_request
from serving import REQUEST_SECONDS, Server, wait_until
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

VOCABULARY = 320
NAN, INFINITY = float("nan"), float("inf")
CHECK_EVERY = 50

# How vLLM's own refusals call a field that they do not name.
OTHER_WORDS = {
    "prompt": ("Token id", "decoder prompt", "context length", "input tokens", "TextEncodeInput"),
    "structured_outputs": ("structured outputs", "kind of constraints"),
    "prompt_logprobs": ("prompt logprobs",),
    "vllm_xargs": ("extra_args", "diffusion_"),
}


def examples(count: int) -> Any:
    """Hypothesis's settings: the same ``count`` examples every time, as long as each may take."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Sound:
    """A valid request and a body that asks for it."""

    request: RandomRequest
    body: dict[str, Any]


UNKNOWN_FIELDS = ["foo", "messages", "tools", "best_of", "e\u0301\U0001f600"]
small = st.integers(-3, 4)
huge = st.sampled_from([2**31, 2**63, 2**64 - 1, -(2**63) - 1, 10**30, 10**300])
texts = st.text(max_size=12)
scalars = st.one_of(st.none(), st.booleans(), small, huge, st.floats(), texts)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@st.composite
def sound(draw: st.DrawFn, stream: bool = True) -> Sound:
    """A drawn request of at most 20 tokens, streamed or not, two choices or one, with fields that change nothing."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    request = draw_request(rng, max_tokens=20)
    options = request.options
    if options["temperature"] and draw(st.integers(0, 3)) == 0:
        options["n"] = 2
    if draw(st.integers(0, 3)) == 0:
        options["stop"] = draw(st.lists(st.text("abehinort m=]N0", min_size=1, max_size=2), min_size=1, max_size=4))
    if draw(st.booleans()):
        options["skip_special_tokens"] = draw(st.booleans())
    body = completion_body(request.prompt, options)
    if stream and not options.get("prompt_logprobs") and draw(st.integers(0, 2)) == 0:
        body["stream"] = True

    # Numbers as texts and integers as floats, as pydantic takes them; nothing, where nothing is meant; unknown fields.
    for name in ("max_tokens", "min_tokens", "top_k", "seed", "temperature", "top_p"):
        if name in body and draw(st.integers(0, 4)) == 0:
            body[name] = str(body[name]) if draw(st.booleans()) else float(body[name])
    for name in ("top_k", "min_p", "logit_bias", "stop", "logprobs", "seed", "allowed_token_ids", "response_format"):
        if name not in body and draw(st.integers(0, 6)) == 0:
            body[name] = None
    body |= draw(st.dictionaries(st.sampled_from(UNKNOWN_FIELDS), junk, max_size=2))
    if draw(st.booleans()):
        body["user"] = draw(texts)
    return Sound(request, body)


def not_an(*kinds: type) -> st.SearchStrategy:
    """JSON values that pydantic takes for none of these types."""
    values = {
        bool: st.just({"a": 1}),
        int: st.sampled_from(["many", "", [], [1], {}, {"a": 1}, 1.5]),
        float: st.sampled_from(["hot", "", [], [1], {}, {"a": 1}]),
        list: st.sampled_from([5, 1.5, "abc", {}, {"a": 1}]),
        dict: st.sampled_from([5, 1.5, "abc", [], [1]]),
    }
    return st.one_of(*(values[kind] for kind in kinds))


def outside(low: float, high: float) -> st.SearchStrategy:
    """Numbers below ``low`` and above ``high``, and what is no number."""
    return st.one_of(
        st.floats(max_value=low, exclude_max=True, allow_nan=False),
        st.floats(min_value=high, exclude_min=True, allow_nan=False),
        st.sampled_from([NAN, INFINITY, -INFINITY]),
        not_an(float),
    )


no_token = st.one_of(st.integers(VOCABULARY, 2**40), st.integers(max_value=-1), huge)
bad_logprobs = st.one_of(st.integers(21, 2**40), st.integers(-(2**40), -2), st.sampled_from(["1", 1.5, NAN, [1], {}]))

# Values of a field that are wrong in any request of `sound`.
WRONG: dict[str, st.SearchStrategy] = {
    "temperature": outside(0, 2),
    "top_p": outside(1e-300, 1) | st.just(0),
    "min_p": outside(0, 1),
    "presence_penalty": outside(-2, 2),
    "frequency_penalty": outside(-2, 2),
    "repetition_penalty": st.floats(max_value=0, allow_nan=False) | st.sampled_from([NAN, INFINITY]) | not_an(float),
    "top_k": st.integers(max_value=-2) | not_an(int),
    "seed": st.sampled_from([2**63, -(2**63) - 1, 10**300]) | not_an(int),
    "max_tokens": st.integers(max_value=0) | st.integers(min_value=1025) | not_an(int),
    "min_tokens": st.integers(max_value=-1) | st.integers(min_value=1025) | not_an(int),
    "n": st.integers(max_value=0) | st.integers(min_value=16385) | not_an(int),
    "logprobs": bad_logprobs,
    "prompt_logprobs": bad_logprobs,
    "logit_bias": st.one_of(
        st.dictionaries(no_token.map(str), st.floats(-1, 1), min_size=1, max_size=3),
        st.dictionaries(st.text("abc", max_size=3), st.floats(-1, 1), min_size=1, max_size=3),
        st.sampled_from([{"5": "x"}, {"5": None}, {"5": []}]),
        not_an(dict),
    ),
    "stop": st.sampled_from(["", [""], ["a", ""], 5, [5], ["a"] * 5, ["a"] * 5000, {}, [["a"]], {"a": 1}]),
    "stop_token_ids": st.lists(no_token, min_size=1, max_size=3)
    | st.sampled_from([["x"], [[5]], [1.5]])
    | not_an(list),
    "allowed_token_ids": st.lists(no_token, max_size=3) | st.sampled_from([["x"], [[5]], [1.5]]) | not_an(list),
    "bad_words": st.sampled_from([[""], [" "], ["a", "\n"], [5], [["a"]], [f"a{i}" for i in range(1001)]])
    | not_an(list),
    "prompt": st.one_of(
        st.lists(no_token, min_size=1, max_size=3),
        st.sampled_from([None, "", [], [[]], [[5], []], ["a", ""], [1.5], [[[5]]], {}, {"a": 1}, 5, [5] * 1100]),
    ),
    "ignore_eos": st.sampled_from(["perhaps", 2, -1, [], {}, None]),
    "echo": st.sampled_from(["perhaps", 2, [], {}]),
    "stream_options": st.sampled_from([{"include_usage": True}, 5, "abc"]),
    "structured_outputs": st.sampled_from([{}, {"regex": "a", "choice": ["a"]}, {"regex": 5}, {"choice": "a"}]),
    "response_format": st.sampled_from([{"type": "what"}, {"type": "json_schema"}, [1], 5, "json"]),
    "thinking_token_budget": st.integers(0, 2**40) | st.integers(max_value=-2) | st.sampled_from([1.5, "x", []]),
    "truncate_prompt_tokens": st.integers(max_value=-2) | not_an(int),
    "kv_transfer_params": st.sampled_from([{"a": 1}, {"do_remote_prefill": True}, 5, []]),
    "ec_transfer_params": st.sampled_from([{"a": 1}, 5, []]),
    "priority": st.sampled_from([2**63, -(2**70), "x", 1.5]),
    "cache_salt": st.sampled_from(["", 5, [], "x" * 2000]),
    "prompt_embeds": st.sampled_from(["aaa", 5, ["a"], {}]),
    "logprob_token_ids": st.lists(no_token, min_size=1, max_size=3) | st.just([5] * 129) | not_an(list),
    "suffix": st.sampled_from(["x", 5, []]),
    "repetition_detection": st.sampled_from([{"max_pattern_size": -1}, {"max_pattern_size": 2, "min_count": 1}, 5, []]),
    "vllm_xargs": st.one_of(
        st.dictionaries(st.text(min_size=1, max_size=6).map("diffusion_".__add__), scalars, min_size=1, max_size=3),
        st.dictionaries(texts, junk, min_size=1, max_size=3),
        st.sampled_from(
            [
                {"diffusion_mode": "unheard_of"},
                {"diffusion_mode": ["ar"]},
                {"diffusion_mode": "ar", "diffusion_max_steps": 4},
                {"diffusion_mode": "mock_ar"},
                {"diffusion_strategy": "posterior", "diffusion_remasking": "margin"},
                {"diffusion_strategy": 5},
                {"diffusion_adaptive_unmasking": True},
                {"diffusion_strategy": "predict_and_noise", "diffusion_adaptive_unmasking": 0.5},
                {"diffusion_noise_schedule": "cosine"},
            ]
        ),
        st.fixed_dictionaries({"diffusion_confidence_threshold": outside(1e-300, 1) | st.just(0)}),
        st.fixed_dictionaries(
            {"diffusion_max_steps": st.integers(max_value=0) | st.integers(1025) | not_an(int, dict)}
        ),
        st.fixed_dictionaries({"diffusion_canvas_length": st.integers(max_value=0) | st.integers(17) | not_an(int)}),
        not_an(dict),
    ),
}


@st.composite
def wrong(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A body with one wrong field, and its name."""
    body = draw(sound(stream=False)).body
    name = draw(st.sampled_from(sorted(WRONG)))
    if name == "logprob_token_ids":
        body["logprobs"] = 3
    return name, {**body, name: draw(WRONG[name])}


JUNK_FIELDS = sorted(
    (
        WRONG.keys()
        | {"user", "length_penalty", "return_token_ids", "session_id", "watermarking", "mm_payload", "model"}
        | {"stream_interval"}
    )
    - {"structured_outputs"}
)
SENSELESS = [
    b"",
    b"[]",
    b"5",
    b'"prompt"',
    b"null",
    b"{",
    b'{"prompt": ',
    b"\xff\xfe",
    b"{}",
    b'{"prompt": "a"',
    b"[" * 5000,
]


def assert_refused(response: httpx.Response, fields: set[str]) -> None:
    """An answer of status 400, 404 or 422 that names one of the fields."""
    assert response.status_code in (400, 404, 422), response.text
    error = response.json()["error"]
    said = f"{error['message']} {error['param']}"
    names = [rf"{re.escape(field)}(?![a-z_])" for field in fields]
    names += [re.escape(words) for field in fields for words in OTHER_WORDS.get(field, ())]
    assert re.search(rf"(?<![a-z_])({'|'.join(names)})", said), said


class Examples:
    """The server and what judges it; counts examples: after every fifty a golden request must be answered exactly."""

    def __init__(self, server: Server, model: TwoTowerModel, tokenizer: TokenizerLike):
        self.server, self._model, self._tokenizer, self._count = server, model, tokenizer, 0

    def post(self, body: dict[str, Any] | bytes) -> httpx.Response:
        """Posts a body; not-a-number and infinity go as Python writes them, which vLLM's parser takes."""
        content = body if isinstance(body, bytes) else json.dumps({"model": self.server.model, **body}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{self.server.url}/v1/completions"
        return httpx.post(url, content=content, headers=headers, timeout=REQUEST_SECONDS)

    def assert_exact(self, asked: Sound, response: httpx.Response) -> None:
        """The answers to a request, put together if they came in pieces, are the oracle's."""
        assert response.status_code == 200, response.text
        got = answers_in(response.text, bool(asked.body.get("stream")))
        want = expected_answers(self._model, self._tokenizer, asked.request.prompt, asked.request.options)
        assert_same(got, want)

    def done(self) -> None:
        self._count += 1
        if self._count % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        run = golden_data.diffusion_runs("A")[0]
        options = {
            "max_tokens": run.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "extra_args": {"diffusion_confidence_threshold": run.gamma, "diffusion_max_steps": run.steps},
        }
        response = self.post(completion_body(run.prompt, options))
        assert response.json()["choices"][0]["token_ids"] == list(run.tokens)


@pytest.fixture(scope="module", autouse=True)
def seen(server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike) -> Iterator[Examples]:
    """At the end the server is idle and sound, and its log has no traceback."""
    log_start = len(server.log_text())
    counted = Examples(server, oracle, tokenizer)
    yield counted
    counted.check()
    running = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    wait_until(lambda: not any(server.metrics()[name] for name in running), "the server is idle")
    assert "Traceback" not in server.log_text()[log_start:]


@examples(25)
@given(st.lists(sound(), min_size=1, max_size=3), wrong())
def test_sound_requests_are_answered_exactly(
    seen: Examples, asked: list[Sound], beside: tuple[str, dict[str, Any]]
) -> None:
    """Several at once, beside one that is refused."""
    bodies = [x.body for x in asked] + [beside[1]]
    with ThreadPoolExecutor(len(bodies)) as threads:
        *responses, refusal = threads.map(seen.post, bodies)
    for x, response in zip(asked, responses, strict=True):
        seen.assert_exact(x, response)
    assert_refused(refusal, {beside[0]})
    seen.done()


@examples(100)
@given(wrong())
def test_wrong_fields_are_named(seen: Examples, asked: tuple[str, dict[str, Any]]) -> None:
    name, body = asked
    assert_refused(seen.post(body), {name})
    seen.done()


@examples(40)
@given(sound(stream=False), st.dictionaries(st.sampled_from(JUNK_FIELDS), junk, min_size=1, max_size=4))
def test_senseless_fields_do_no_harm(seen: Examples, asked: Sound, senseless: dict[str, Any]) -> None:
    """Some of them happen to make sense."""
    body = asked.body | senseless
    response = seen.post(body)
    if response.status_code != 200:
        assert_refused(response, set(body) | {"model"})
    seen.done()


@pytest.mark.parametrize("body", SENSELESS, ids=lambda body: repr(body[:15]))
def test_senseless_bodies_do_no_harm(seen: Examples, body: bytes) -> None:
    assert seen.post(body).status_code in (400, 422)
