"""What a server cannot honour is refused with HTTP 400, in words; it is never ignored, and never an error 500."""

from __future__ import annotations

import json
from typing import Any

import golden_data
import httpx
import openai
import pytest
from bad_requests import BAD_FIELDS, BAD_OPTIONS
from serving import Server, token_request

# A valid value of every option of the block sampler.
BLOCK_OPTIONS = {
    "diffusion_confidence_threshold": 0.5,
    "diffusion_max_steps": 4,
    "diffusion_canvas_length": 8,
    "diffusion_strategy": "confidence_unmasking",
    "diffusion_noise_schedule": "linear",
    "diffusion_adaptive_unmasking": True,
    "diffusion_remasking": "confidence",
}
# What each strategy leaves to the others.
FOREIGN_OPTIONS = [
    ("confidence_unmasking", "diffusion_noise_schedule"),
    ("confidence_unmasking", "diffusion_adaptive_unmasking"),
    ("confidence_unmasking", "diffusion_remasking"),
    ("predict_and_noise", "diffusion_confidence_threshold"),
    ("posterior", "diffusion_confidence_threshold"),
    ("posterior", "diffusion_adaptive_unmasking"),
    ("posterior", "diffusion_remasking"),
]


def post(server: Server, **fields: Any) -> tuple[int, dict]:
    run = golden_data.diffusion_runs("A")[0]
    defaults = {
        "prompt": list(run.prompt),
        "max_tokens": run.max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"diffusion_confidence_threshold": run.gamma, "diffusion_max_steps": run.steps},
    }
    response = server.post("/v1/completions", **(defaults | fields))
    return response.status_code, response.json()


def assert_refused(answer: tuple[int, dict], *words: str) -> None:
    status, body = answer
    assert status == 400, body
    message = body["error"]["message"]
    assert all(word in message for word in words), message


def assert_works(server: Server) -> None:
    """A good request right after a bad one."""
    status, body = post(server)
    assert status == 200, body
    assert tuple(body["choices"][0]["token_ids"]) == golden_data.diffusion_runs("A")[0].tokens


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=str)
def test_bad_option(server: Server, name: str, value: Any) -> None:
    assert_refused(post(server, vllm_xargs={name: value}), name, str(value))
    assert_works(server)


@pytest.mark.parametrize(("field", "value", "words"), BAD_FIELDS, ids=str)
def test_bad_field(server: Server, field: str, value: Any, words: tuple[str, ...]) -> None:
    assert_refused(post(server, **{field: value}), *words)
    assert_works(server)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**64, "temperature": 1},
        {"stream_interval": 10**30},
        {"repetition_detection": {"max_pattern_size": 2**64, "min_count": 2}},
        {"stop": ["a", "\ud800"]},
        {"bad_words": ["\ud800"]},
    ],
    ids=str,
)
def test_value_that_no_message_can_hold(server: Server, fields: dict[str, Any]) -> None:
    """JSON can hold integers of any size and half a pair of surrogates; messages to the engine cannot."""
    body = json.dumps({"model": server.model, "prompt": [5], "max_tokens": 4, **fields})
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert_refused((response.status_code, response.json()), next(iter(fields)))
    assert_works(server)


def test_bad_option_in_a_stream_is_its_only_event(server: Server) -> None:
    """vLLM has answered a streaming request with status 200 before the engine checks it; the refusal comes after."""
    with pytest.raises(openai.APIError) as refusal:
        list(
            server.openai.completions.create(
                model=server.model, stream=True, **token_request([5], 8, diffusion_max_steps=1025)
            )
        )
    assert refusal.value.body["code"] == 400
    assert "diffusion_max_steps=1025" in refusal.value.message
    assert_works(server)


@pytest.mark.parametrize("option", BLOCK_OPTIONS)
def test_block_options_mean_nothing_to_ar(server: Server, option: str) -> None:
    """JSON's true arrives as 1."""
    value = BLOCK_OPTIONS[option]
    answer = post(server, vllm_xargs={"diffusion_mode": "ar", option: value})
    assert_refused(answer, option, "1" if value is True else str(value), "'ar'")
    assert_works(server)


@pytest.mark.parametrize(("strategy", "option"), FOREIGN_OPTIONS)
def test_options_of_another_strategy_are_refused(server: Server, strategy: str, option: str) -> None:
    answer = post(server, vllm_xargs={"diffusion_strategy": strategy, option: BLOCK_OPTIONS[option]})
    assert_refused(answer, option, "no meaning", repr(strategy))
    assert_works(server)


@pytest.mark.parametrize(
    "structured_outputs", [{"regex": "("}, {"json": "{"}, {"grammar": "what"}, {"choice": []}, {}], ids=str
)
def test_grammar_that_is_none(server: Server, structured_outputs: dict) -> None:
    """Where grammars are honoured, vLLM's own checks hold."""
    xargs = {"diffusion_mode": "ar"}
    status, body = post(server, structured_outputs=structured_outputs, vllm_xargs=xargs)
    assert status == 400, body
    assert_works(server)


def test_grammars_work_token_by_token(server: Server) -> None:
    """The very grammars that blocks refuse, with a bias towards b."""
    options = {"ignore_eos": False, "logit_bias": {"69": 50}, "vllm_xargs": {"diffusion_mode": "ar"}}
    for fields in ({"structured_outputs": {"regex": "a+b"}}, {"structured_outputs": {"choice": ["aaab", "ab"]}}):
        status, body = post(server, **fields, **options)
        assert status == 200, body
        assert body["choices"][0]["text"] == "ab"
    assert_refused(post(server, **fields), "structured_outputs", "use diffusion_mode 'ar'")


def test_prompts_that_cannot_be(server: Server) -> None:
    assert_refused(post(server, prompt=[]), "prompt")
    assert_refused(post(server, prompt=[100000]), "100000")
    assert_refused(post(server, prompt=[5] * 1100), "1100", "1024")
    assert_works(server)


def test_refusals_leave_nothing_alarming_in_the_log(server: Server) -> None:
    before = len(server.log_text())
    for name, value in BAD_OPTIONS:
        assert_refused(post(server, vllm_xargs={name: value}), name)
    for field, value, words in BAD_FIELDS:
        assert_refused(post(server, **{field: value}), *words)
    log = server.log_text()[before:]
    assert "400 Bad Request" in log
    assert "Traceback" not in log
    assert " ERROR " not in log
