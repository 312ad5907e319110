"""Completions over token ids: the goldens, every option of a request, lengths, stops, and n."""

from __future__ import annotations

import golden_data
import pytest
from answers import golden_request
from serving import Server, token_request

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

PROMPT = (5, 60, 7, 200, 31)


def complete(server: Server, request: dict) -> tuple[tuple[int, ...], str]:
    """Tokens and finish reason of the only choice."""
    [choice] = server.openai.completions.create(model=server.model, **request).choices
    return tuple(choice.token_ids), choice.finish_reason


def test_mask_diffusion_equals_the_goldens(server: Server) -> None:
    runs = golden_data.diffusion_runs("A")
    assert [complete(server, golden_request(run)) for run in runs] == [(run.tokens, "length") for run in runs]


def test_ar_equals_the_goldens(server: Server) -> None:
    for prompt in golden_data.prompts("A"):
        run = prompt["ar"]
        request = token_request(prompt["ids"], run["max_new_tokens"], diffusion_mode="ar")
        assert complete(server, request) == (tuple(run["new_ids"]), "length")


def test_stop_token_ends_the_text_inside_a_block(server: Server) -> None:
    for run in golden_data.diffusion_runs("A", "eos_runs"):
        stopped = run.tokens[-1] == run.eos_token_id
        assert complete(server, golden_request(run)) == (run.tokens, "stop" if stopped else "length")


def test_stop_string_cuts_the_text(server: Server) -> None:
    request = token_request(PROMPT, 40)
    whole = server.openai.completions.create(model=server.model, **request).choices[0].text
    stop = next(c for c in whole[5:] if c.isascii() and c.isprintable())
    [choice] = server.openai.completions.create(model=server.model, stop=stop, **request).choices
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("max_tokens", [1, 2, 15, 16, 17, 33])
def test_max_tokens_is_exact(server: Server, oracle: TwoTowerModel, max_tokens: int) -> None:
    completion = server.openai.completions.create(model=server.model, **token_request(PROMPT, max_tokens))
    assert completion.choices[0].token_ids == generate_mask_diffusion(oracle, PROMPT, max_tokens).tokens
    assert completion.choices[0].finish_reason == "length"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), max_tokens)
    assert usage.total_tokens == len(PROMPT) + max_tokens


@pytest.mark.parametrize(
    ("option", "value", "keyword"),
    [
        ("diffusion_confidence_threshold", 0.3, "gamma"),
        ("diffusion_confidence_threshold", 1, "gamma"),
        ("diffusion_max_steps", 1, "steps"),
        ("diffusion_max_steps", 3, "steps"),
        ("diffusion_canvas_length", 1, "block_size"),
        ("diffusion_canvas_length", 5, "block_size"),
    ],
)
def test_each_option_alone_has_its_effect(
    server: Server, oracle: TwoTowerModel, option: str, value: float, keyword: str
) -> None:
    tokens, _ = complete(server, token_request(PROMPT, 40, **{option: value}))
    assert list(tokens) == generate_mask_diffusion(oracle, PROMPT, 40, **{keyword: value}).tokens


def test_several_prompts_in_one_request(server: Server, oracle: TwoTowerModel) -> None:
    prompts = [[9], [5, 6, 7], list(range(10, 40))]
    request = token_request([], 20, diffusion_mode="ar") | {"prompt": prompts}
    choices = server.openai.completions.create(model=server.model, **request).choices
    assert [choice.token_ids for choice in choices] == [generate_ar(oracle, prompt, 20).tokens for prompt in prompts]


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_two_choices_with_a_seed_repeat(server: Server, mode: str) -> None:
    request = token_request(PROMPT, 24, diffusion_mode=mode) | {"temperature": 1.5, "n": 2, "seed": 7}
    first, second = (
        [choice.token_ids for choice in server.openai.completions.create(model=server.model, **request).choices]
        for _ in range(2)
    )
    assert [len(tokens) for tokens in first] == [24, 24]
    assert first[0] != first[1]
    assert first == second
