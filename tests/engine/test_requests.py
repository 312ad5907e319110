"""What a request may ask of the engine: where it stops, how it draws, and what is refused without harm."""

from __future__ import annotations

from collections.abc import Iterator

import golden_data
import pytest
from engines import assert_idle, generate, run_all, running_engine, tokens_of, traced
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

RUN = golden_data.diffusion_runs("A")[5]  # two tokens of prompt, canvas 16, 16 steps, threshold 0.8


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(golden_data.checkpoint("A")) as llm:
        yield llm
        assert_idle(llm)


def one(llm: LLM, **overrides) -> object:
    """The completion of ``RUN`` with other sampling parameters."""
    return generate(llm, [RUN.prompt], [RUN.params(**overrides)])[0].outputs[0]


def first_seen(tokens: tuple[int, ...]) -> list[int]:
    """Indices at which a token occurs for the first time."""
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


def test_stop_token_cuts_inside_a_block(llm: LLM) -> None:
    for index in first_seen(RUN.tokens):
        completion = one(llm, stop_token_ids=[RUN.tokens[index]])
        assert tuple(completion.token_ids) == RUN.tokens[: index + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", RUN.tokens[index])


def test_eos_cuts_inside_a_block_unless_ignored(llm: LLM) -> None:
    """The checkpoint's EOS token (2): a prompt whose output holds it ends there, or goes on with ``ignore_eos``."""
    from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion

    model = TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))
    prompts = [[4 + i, 9, 100 + i] for i in range(60)]
    whole = [generate_mask_diffusion(model, prompt, 32).tokens for prompt in prompts]
    prompt, tokens = next((p, t) for p, t in zip(prompts, whole, strict=True) if 2 in t[:-1])
    ended, ignored = generate(
        llm, [prompt] * 2, [SamplingParams(temperature=0, max_tokens=32, ignore_eos=flag) for flag in (False, True)]
    )
    assert tokens_of([ended]) == [tuple(tokens[: tokens.index(2) + 1])]
    assert ended.outputs[0].finish_reason == "stop"
    assert tokens_of([ignored]) == [tuple(tokens)]
    assert ignored.outputs[0].finish_reason == "length"


def test_stop_string_cuts_inside_a_block(llm: LLM) -> None:
    text = one(llm).text
    for length in (1, 3):
        for start in range(0, len(text) - length, 7):
            stop = text[start : start + length]
            completion = one(llm, stop=[stop])
            assert completion.text == text[: text.index(stop)]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    stop = text[20:23]
    assert one(llm, stop=[stop], include_stop_str_in_output=True).text == text[: text.index(stop) + len(stop)]


def test_seeded_draws_do_not_depend_on_the_batch(llm: LLM) -> None:
    """The same request gives the same tokens alone, in a batch, and in another order; another seed gives others."""
    prompts = [run.prompt for run in golden_data.diffusion_runs("A")]
    params = [
        RUN.params(
            temperature=0.5 + 0.1 * (i % 7),
            seed=i,
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20)[i % 3 == 0],
            min_p=(0.0, 0.05)[i % 5 == 0],
            extra_args={"diffusion_mode": ("mask_diffusion", "ar")[i % 4 == 3]},
        )
        for i in range(len(prompts))
    ]
    together = tokens_of(generate(llm, prompts, params))
    backwards = tokens_of(generate(llm, prompts[::-1], params[::-1]))[::-1]
    assert together == backwards
    for i in range(0, len(prompts), 5):
        assert tokens_of(generate(llm, [prompts[i]], [params[i]])) == [together[i]]
    same_prompt = tokens_of(generate(llm, [prompts[0]] * 8, [RUN.params(temperature=1, seed=i) for i in range(8)]))
    assert len(set(same_prompt)) == 8


def test_without_a_seed_draws_differ_from_run_to_run(llm: LLM) -> None:
    params = RUN.params(temperature=1.0)
    outputs = [tokens_of(generate(llm, [RUN.prompt], [params]))[0] for _ in range(4)]
    assert len(set(outputs)) == 4


def test_a_low_temperature_is_greedy(llm: LLM) -> None:
    assert tuple(one(llm, temperature=0.011, seed=1).token_ids) == RUN.tokens


def test_several_completions(llm: LLM) -> None:
    [output] = generate(llm, [RUN.prompt], [RUN.params(temperature=1.0, seed=5, n=3)])
    completions = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(completions)) == 3
    assert all(len(tokens) == RUN.max_new_tokens for tokens in completions)


def test_no_pass_after_the_last_token(llm: LLM) -> None:
    """A request that needs one block runs one block's passes."""
    with traced(llm) as trace:
        [output] = generate(llm, [RUN.prompt], [RUN.params(max_tokens=16)])
    assert len(trace.of(output)) == len(RUN.blocks[0])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("diffusion_confidence_threshold", {"extra_args": {"diffusion_confidence_threshold": 0}}),
        ("diffusion_canvas_length", {"extra_args": {"diffusion_canvas_length": 17}}),
        ("diffusion_max_steps", {"extra_args": {"diffusion_max_steps": 0}}),
        ("diffusion_strategy", {"extra_args": {"diffusion_strategy": "magic"}}),
        ("diffusion_mode", {"extra_args": {"diffusion_mode": "magic"}}),
        ("diffusion_magic", {"extra_args": {"diffusion_magic": 1}}),
        ("structured_outputs", {"structured_outputs": StructuredOutputsParams(regex="a+")}),
        ("thinking_token_budget", {"thinking_token_budget": 2}),
        ("allowed_token_ids", {"allowed_token_ids": [3]}),
    ],
)
def test_a_refused_request_leaves_the_engine_working(llm: LLM, name: str, overrides: dict) -> None:
    with pytest.raises(VLLMValidationError, match=name):
        one(llm, **overrides)
    assert run_all(llm, [RUN]) == [RUN.tokens]


def test_extreme_values_are_harmless(llm: LLM) -> None:
    """Values that vLLM admits but that do not fit a tensor or the vocabulary as they are."""
    for overrides in (
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"top_k": 10**12},
        {"temperature": 2.0},
    ):
        assert len(one(llm, **{"temperature": 0.5, **overrides}).token_ids) == RUN.max_new_tokens
    with pytest.raises(VLLMValidationError, match=f"seed={2**64}: has an integer beyond 64 bits"):
        one(llm, seed=2**64)  # as if the engine ran in a process of its own
    assert run_all(llm, [RUN]) == [RUN.tokens]
