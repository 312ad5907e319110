"""Traces over HTTP: in whole responses and in chunks, of completions and chats; other APIs refuse them."""

from __future__ import annotations

import json
from typing import Any

import golden_data
import httpx
import pytest
from golden_data import DiffusionRun
from serving import Server

from vllm_twotower.trace import DiffusionTrace

RUNS = [run for run in golden_data.diffusion_runs("A") if run.blocks]
PROMPT = [5, 60, 7, 8, 100]


def body(run: DiffusionRun, level: str = "passes") -> dict[str, Any]:
    return {
        "prompt": list(run.prompt),
        "max_tokens": run.max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {
            "diffusion_confidence_threshold": run.gamma,
            "diffusion_max_steps": run.steps,
            "diffusion_canvas_length": run.block_size,
            "diffusion_trace": level,
        },
    }


def choices_of(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = server.post(path, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    found, request = [], {"model": server.model, "stream": True, **fields}
    with httpx.stream("POST", f"{server.url}{path}", json=request, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                data = json.loads(line.removeprefix("data: "))
                assert "error" not in data, data
                found += data["choices"]
    return found


def together(chunks: list[dict[str, Any]], index: int = 0) -> DiffusionTrace:
    """The trace of one choice, of its chunks."""
    trace = DiffusionTrace()
    for chunk in chunks:
        if chunk["index"] == index and "diffusion_trace" in chunk:
            trace.extend(DiffusionTrace.from_json(chunk["diffusion_trace"]))
    return trace


def canvases(trace: DiffusionTrace) -> list[list[tuple[int, ...]]]:
    return [[tuple(canvas) for canvas in block.canvases] for block in trace.blocks]


def expected(run: DiffusionRun) -> list[list[tuple[int, ...]]]:
    return [[after for _, _, after in block] for block in run.blocks]


@pytest.mark.parametrize("run", RUNS[::5], ids=lambda run: f"{len(run.prompt)}-{run.block_size}-{run.gamma}")
def test_canvases_are_the_reference_s(server: Server, run: DiffusionRun) -> None:
    [choice] = choices_of(server, "/v1/completions", **body(run))
    whole = DiffusionTrace.from_json(choice["diffusion_trace"])
    assert canvases(whole) == expected(run)
    assert len(whole) == len(choice["token_ids"]) == len(run.tokens)
    chunks = streamed(server, "/v1/completions", **body(run))
    assert all(len(chunk["diffusion_trace"]["block"]) == len(chunk["token_ids"]) for chunk in chunks)
    assert together(chunks).to_json() == choice["diffusion_trace"]


def test_several_prompts_and_choices(server: Server) -> None:
    fields = {"n": 2, "temperature": 1, "seed": 4, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    fields |= {"prompt": [PROMPT, PROMPT[::-1]], "vllm_xargs": {"diffusion_trace": "passes"}}
    choices = choices_of(server, "/v1/completions", **fields)
    chunks = streamed(server, "/v1/completions", **fields)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        trace = DiffusionTrace.from_json(choice["diffusion_trace"])
        for block in trace.blocks:
            returned = choice["token_ids"][block.start : block.start + block.tokens]
            assert block.canvases[-1][: block.tokens] == returned
        assert canvases(together(chunks, choice["index"])) == canvases(trace)


@pytest.mark.parametrize("mode", ["mask_diffusion", "verified", "ar"])
def test_chats(server: Server, mode: str) -> None:
    """A chat's stream begins with a chunk that has a role and no tokens."""
    fields = {"messages": [{"role": "user", "content": "Count: 10"}], "max_tokens": 37, "temperature": 0}
    fields |= {"ignore_eos": True, "vllm_xargs": {"diffusion_mode": mode, "diffusion_trace": "tokens"}}
    [choice] = choices_of(server, "/v1/chat/completions", **fields)
    trace = DiffusionTrace.from_json(choice["diffusion_trace"])
    assert len(trace) == 37
    assert all(block.canvases is None for block in trace.blocks)
    assert bool(trace.blocks) == (mode != "ar")
    first, *chunks = streamed(server, "/v1/chat/completions", **fields)
    assert "diffusion_trace" not in first
    assert together(chunks).to_json() == choice["diffusion_trace"]


def test_a_stop_string_cuts_the_trace(server: Server) -> None:
    fields = body(RUNS[0], "tokens")
    [whole] = choices_of(server, "/v1/completions", **fields)
    for place in (3, 10):
        [cut] = choices_of(server, "/v1/completions", **fields, stop=[whole["text"][place : place + 2]])
        assert len(cut["diffusion_trace"]["block"]) == len(cut["token_ids"]) < len(whole["token_ids"])
        chunks = streamed(server, "/v1/completions", **fields, stop=[whole["text"][place : place + 2]])
        assert together(chunks).to_json() == cut["diffusion_trace"]


def test_without_the_option_responses_have_none(server: Server) -> None:
    for level in (None, "none"):
        fields = {"prompt": PROMPT, "max_tokens": 5, "vllm_xargs": {"diffusion_trace": level} if level else None}
        assert "diffusion_trace" not in choices_of(server, "/v1/completions", **fields)[0]
        assert all("diffusion_trace" not in chunk for chunk in streamed(server, "/v1/completions", **fields))


XARGS = {"vllm_xargs": {"diffusion_trace": "tokens"}}
USER = [{"role": "user", "content": "Count: 10"}]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "Count: 10", **XARGS}),
        ("/v1/messages", {"messages": USER, "max_tokens": 5, **XARGS}),
        ("/v1/chat/completions/batch", {"messages": [USER, USER], **XARGS}),
        ("/v1/completions", {"prompt": PROMPT, "use_beam_search": True, "n": 2, **XARGS}),
    ],
)
def test_refused_where_a_response_has_no_room(server: Server, path: str, fields: dict[str, Any]) -> None:
    response = server.post(path, **fields)
    assert response.status_code == 400, response.text
    assert "diffusion_trace" in response.text
    assert choices_of(server, "/v1/completions", prompt=PROMPT, max_tokens=3)
