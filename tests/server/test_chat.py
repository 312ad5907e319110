"""Text with the trained model, served as the README says: chat, completions, streaming, start and stop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server
from vllm.tokenizers import get_tokenizer

from vllm_twotower.training.problems import stated_result

PROBLEMS = 20
SCHEMA = {
    "type": "object",
    "properties": {
        "fruit": {"type": "string", "enum": ["apples", "pears", "plums"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["fruit", "count", "sure"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Tom has 12 apples and buys 7 more. How many apples does he have?"}]


def held_out(folder: Path) -> list[dict[str, str]]:
    """Problems that the model has not seen in training."""
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()][:PROBLEMS]


def question(problem: dict[str, str]) -> list[dict[str, str]]:
    """The problem as a chat; the chat template puts its prompt together again."""
    return [{"role": "user", "content": problem["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")}]


def is_right(text: str, problem: dict[str, str]) -> bool:
    return stated_result(text) == problem["result"]


def test_profile_names_the_model(tiny_server: Server) -> None:
    [model] = tiny_server.openai.models.list().data
    assert (model.id, model.max_model_len) == ("tiny-twotower", 2048)


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_chat_answers_held_out_problems(tiny_server: Server, tiny_folder: Path, mode: str) -> None:
    wrong = []
    for problem in held_out(tiny_folder):
        answer = tiny_server.openai.chat.completions.create(
            model=tiny_server.model,
            messages=question(problem),
            max_tokens=96,
            temperature=0,
            extra_body={"vllm_xargs": {"diffusion_mode": mode}},
        )
        [choice] = answer.choices
        if not is_right(choice.message.content, problem) or choice.finish_reason != "stop":
            wrong.append((problem["prompt"], choice.message.content, choice.finish_reason))
    assert len(wrong) <= PROBLEMS / 5, wrong


def test_chat_is_the_completion_of_the_templated_prompt(tiny_server: Server, tiny_folder: Path) -> None:
    for problem in held_out(tiny_folder)[:3]:
        chat = tiny_server.openai.chat.completions.create(
            model=tiny_server.model, messages=question(problem), max_tokens=64, temperature=0
        )
        completion = tiny_server.openai.completions.create(
            model=tiny_server.model, prompt=problem["prompt"], max_tokens=64, temperature=0
        )
        assert chat.usage == completion.usage
        assert chat.choices[0].message.content == completion.choices[0].text


def test_streamed_chat_is_the_whole_answer(tiny_server: Server, tiny_folder: Path) -> None:
    for problem in held_out(tiny_folder)[:3]:
        request = {
            "model": tiny_server.model,
            "messages": question(problem),
            "max_tokens": 64,
            "temperature": 0,
            "extra_body": {"vllm_xargs": {"diffusion_confidence_threshold": 1}},
        }
        whole = tiny_server.openai.chat.completions.create(**request)
        pieces, reasons, usages = [], [], []
        for event in tiny_server.openai.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        ):
            usages += [event.usage] if event.usage else []
            pieces += [choice.delta.content for choice in event.choices if choice.delta.content]
            reasons += [choice.finish_reason for choice in event.choices if choice.finish_reason]
        assert "".join(pieces) == whole.choices[0].message.content
        assert reasons == [whole.choices[0].finish_reason]
        assert usages == [whole.usage]
        blocks = -(-whole.usage.completion_tokens // 16)
        assert len(pieces) <= blocks


def test_chat_sampling_with_a_seed_repeats(tiny_server: Server, tiny_folder: Path) -> None:
    def answers() -> list[str]:
        completion = tiny_server.openai.chat.completions.create(
            model=tiny_server.model,
            messages=question(held_out(tiny_folder)[0]),
            max_tokens=64,
            temperature=0.1,
            seed=11,
            n=2,
        )
        return [choice.message.content for choice in completion.choices]

    first = answers()
    assert len(first) == 2
    assert first == answers()


def structured_answers(server: Server, **fields: Any) -> list[str]:
    """Texts of a greedy chat and of five drawn ones, streamed or whole; all end by themselves."""
    texts = []
    extra = fields.pop("extra_body", {})
    for seed in range(6):
        arguments = {
            "model": server.model,
            "messages": QUESTION,
            "max_tokens": 200,
            "temperature": 1.5 if seed else 0,
            "seed": seed,
            "extra_body": {**extra, "vllm_xargs": {"diffusion_mode": "ar"}},
            **fields,
        }
        if seed % 2:
            [choice] = server.openai.chat.completions.create(**arguments).choices
            text, reason = choice.message.content, choice.finish_reason
        else:
            chunks = [x.choices[0] for x in server.openai.chat.completions.create(stream=True, **arguments)]
            text, reason = "".join(x.delta.content or "" for x in chunks), chunks[-1].finish_reason
        assert reason == "stop", text
        texts.append(text)
    return texts


def test_json_schema(tiny_server: Server, tiny_folder: Path) -> None:
    """JSON may have any blanks between its tokens; a bias keeps this model from writing nothing else."""
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    tokenizer = get_tokenizer(tiny_folder)
    blanks = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).isspace()]
    bias = {str(token): -100 for token in blanks}
    for text in structured_answers(tiny_server, response_format=schema, logit_bias=bias):
        answer = json.loads(text)
        assert answer.keys() == {"fruit", "count", "sure"}
        assert answer["fruit"] in ("apples", "pears", "plums")
        assert answer["count"] in range(100)
        assert answer["sure"] in (True, False)


def test_regex(tiny_server: Server) -> None:
    pattern = r"The answer is [1-9][0-9]{0,2}\."
    texts = structured_answers(tiny_server, extra_body={"structured_outputs": {"regex": pattern}})
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(set(texts)) > 1


def test_choice(tiny_server: Server) -> None:
    choices = ["nineteen apples", "19 apples", "no apple", "Übermäßig viele Äpfel €"]
    texts = structured_answers(tiny_server, extra_body={"structured_outputs": {"choice": choices}})
    assert all(text in choices for text in texts), texts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_xargs": {"diffusion_canvas_length": 17}}, ("diffusion_canvas_length", "17")),
        ({"vllm_xargs": {"diffusion_mode": "ar", "diffusion_max_steps": 4}}, ("diffusion_max_steps", "'ar'")),
        ({"vllm_xargs": {"diffusion_mode": "mock_ar"}}, ("diffusion_mode", "removed", "generate_mock_ar")),
        ({"logprobs": True, "top_logprobs": 21}, ("logprobs", "21")),
        ({"presence_penalty": 3}, ("presence_penalty", "3.0")),
        ({"thinking_token_budget": 3}, ("thinking_token_budget", "3")),
        ({"response_format": {"type": "json_object"}}, ("structured_outputs", "json_object=True")),
        ({"temperature": -1}, ("temperature", "-1")),
    ],
    ids=str,
)
def test_bad_chat_is_refused(tiny_server: Server, fields: dict, words: tuple[str, ...]) -> None:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    response = tiny_server.post("/v1/chat/completions", messages=messages, max_tokens=8, **fields)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message


def test_log_is_calm_and_the_server_stops(tiny_server: Server) -> None:
    """Last, since the server is gone afterwards. While it stops, vLLM's processes may complain about each other."""
    log = tiny_server.log_text()
    assert "Application startup complete" in log
    assert "Traceback" not in log
    assert " ERROR " not in log
    assert tiny_server.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{tiny_server.url}/health")
