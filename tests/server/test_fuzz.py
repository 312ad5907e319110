"""Three hundred drawn requests, half of them with something wrong, ten at a time against a live server."""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import golden_data
import httpx
from answers import Answer, assert_same, completion_body, expected_answers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_requests import RandomRequest, draw_request
from serving import Server
from vllm.tokenizers import get_tokenizer

from vllm_twotower.reference import TwoTowerModel

AT_ONCE, EXAMPLES, SECONDS = 10, 300, 120
OPTIONS = (
    "diffusion_mode",
    "diffusion_strategy",
    "diffusion_canvas_length",
    "diffusion_max_steps",
    "diffusion_confidence_threshold",
    "diffusion_noise_schedule",
    "diffusion_adaptive_unmasking",
    "diffusion_remasking",
    "diffusion_nonsense",
)
FIELDS = (
    "prompt",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "structured_outputs",
    "response_format",
    "thinking_token_budget",
    "vllm_xargs",
    "stream",
    "echo",
    "unheard_of",
)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 17, 319, 320, 10**9, 2**63, -(2**63), 10**30, -0.5, 0.3, 1.5, 1e308])
ODD = st.sampled_from([None, True, False, math.nan, math.inf, "", "x", "a\u0000b", "\ufffd\U0001f600", [], {}])
JUNK = st.recursive(
    NUMBERS | ODD,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["5", "a", "regex"]), inner, max_size=2)
    ),
    max_leaves=5,
) | st.sampled_from([list(range(2000)), ["x" * 300] * 40, {str(i): 1 for i in range(310)}])

# What else a message may call a field.
OTHER_NAMES = {
    "vllm_xargs": ["extra_args"],
    "response_format": ["structured_outputs"],
}


@dataclass
class Drawn:
    """A valid request, and what is then changed in its body: fields, and options in ``vllm_xargs``."""

    request: RandomRequest
    changes: dict[str, Any] = field(default_factory=dict)
    option_changes: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        body = completion_body(self.request.prompt, self.request.options)
        body["vllm_xargs"] = {**body["vllm_xargs"], **self.option_changes}
        return {"model": model, **body, **self.changes}

    @property
    def is_valid(self) -> bool:
        return not self.changes and not self.option_changes

    def is_named_in(self, message: str) -> bool:
        """Whether a refusal says which field it is about."""
        names = [*self.changes, *self.option_changes]
        return any(other in message for name in names for other in (name, *OTHER_NAMES.get(name, ())))


@st.composite
def drawn_requests(draw: st.DrawFn) -> Drawn:
    request = draw_request(random.Random(draw(st.integers(0, 2**32))), max_tokens=16)
    if draw(st.booleans()):
        return Drawn(request)
    changes = draw(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=2))
    if not isinstance(changes.get("structured_outputs"), dict | None):
        del changes["structured_outputs"]  # vLLM answers with 500: its CompletionRequest takes it for a mapping
    options = draw(st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=0 if "vllm_xargs" in changes else 2))
    return Drawn(request, changes, options)


def post(server: Server, drawn: Drawn) -> httpx.Response:
    """A plain POST: JSON as Python writes it, with NaN and Infinity, which Python's parser takes."""
    content = json.dumps(drawn.body(server.model))
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=SECONDS)


def answers_of(body: dict[str, Any]) -> list[Answer]:
    return [Answer(c["token_ids"], c["text"], c["finish_reason"], c["stop_reason"]) for c in body["choices"]]


def assert_works(server: Server) -> None:
    """A golden request after all of them."""
    golden = golden_data.diffusion_runs("A")[0]
    options = {
        "diffusion_confidence_threshold": golden.gamma,
        "diffusion_max_steps": golden.steps,
        "diffusion_canvas_length": golden.block_size,
    }
    response = server.post(
        "/v1/completions",
        prompt=list(golden.prompt),
        max_tokens=golden.max_new_tokens,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
        vllm_xargs=options,
    )
    assert tuple(response.json()["choices"][0]["token_ids"]) == golden.tokens


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(one=drawn_requests())
def draw_into(drawn: list[Drawn], one: Drawn) -> None:
    drawn.append(one)


def test_drawn_requests(server: Server, oracle: TwoTowerModel) -> None:
    drawn: list[Drawn] = []
    draw_into(drawn)
    tokenizer, log_start = get_tokenizer(str(golden_data.checkpoint("A"))), len(server.log_text())
    with ThreadPoolExecutor(AT_ONCE) as clients:
        responses = list(clients.map(lambda one: post(server, one), drawn))
    for one, response in zip(drawn, responses, strict=True):
        if one.is_valid:
            assert response.status_code == 200, (one, response.text)
            want = expected_answers(oracle, tokenizer, one.request.prompt, one.request.options)
            for answer in want:
                answer.logprobs = None
            assert_same(answers_of(response.json()), want)
        elif response.status_code != 200:
            changes = f"{one.changes} {one.option_changes}"[:1000]
            assert response.status_code in (400, 422), f"{changes}: {response.text}"
            assert one.is_named_in(response.text), f"{changes}: {response.text}"
    assert_works(server)
    statuses = [response.status_code for response in responses]
    assert len(statuses) == EXAMPLES
    assert sum(one.is_valid for one in drawn) > 100
    assert statuses.count(400) > 50
    assert "Traceback" not in server.log_text()[log_start:]
