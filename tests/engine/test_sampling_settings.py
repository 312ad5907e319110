"""Sampling in engines of their own: with few pages, small budgets, other settings, a user's strategy."""

from __future__ import annotations

import random
from pathlib import Path

import golden_data
import pytest
import torch
from comparisons import assert_logprobs, assert_prompt_logprobs, assert_same, model
from engines import assert_idle, core, generate, running_engine, tokens_of
from oracle import expected
from random_requests import draw_prompt, draw_request
from strategy_plugin import install_left_to_right
from vllm import RequestOutput, SamplingParams

from vllm_twotower.sampling.strategies import strategies

CHECKPOINT = golden_data.checkpoint("A")


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[list[int]], list[SamplingParams], list[RequestOutput]]:
    """Requests whose prompts nearly fill a page, and what they return where there is room."""
    rng = random.Random(8)
    params = [draw_request(rng, max_tokens=60).params() for _ in range(32)]
    prompts = [draw_prompt(rng, tuple(range(95, 127))) for _ in params]
    with running_engine(CHECKPOINT) as llm:
        return prompts, params, generate(llm, prompts, params)


@pytest.mark.parametrize("steps", [2, 4])
def test_preempted_as_undisturbed(steps: int, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few pages requests are thrown out in the middle of a block and start it again."""
    prompts, params, outputs = undisturbed
    page = 64 << 10  # 128 tokens of keys and values, or one state, of this checkpoint
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 14 * page}
    with running_engine(CHECKPOINT, {"denoise_steps_per_engine_step": steps}, **options) as llm:
        scheduler, preempted = core(llm).scheduler, []
        preempt = scheduler._preempt_request

        def count(request, *args, **kwargs):
            preempted.append(request.sampling_params.extra_args)
            return preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler, "_preempt_request", count)
        assert_same(generate(llm, prompts, params), outputs)
        assert {extra.get("diffusion_mode") for extra in preempted} == {None, "ar", "verified"}
        assert_idle(llm)


@pytest.mark.parametrize("logprobs_mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_other_meanings_of_log_probabilities(logprobs_mode: str) -> None:
    """vLLM's ``--logprobs-mode``: of the distribution that is drawn from, or the logits themselves."""
    rng = random.Random(4)
    with running_engine(CHECKPOINT, logprobs_mode=logprobs_mode) as llm:
        for _ in range(6):
            request = draw_request(rng)
            params = request.params(llm.get_tokenizer(), logprobs=3, prompt_logprobs=None)
            [output] = generate(llm, [request.prompt], [request.params(logprobs=3, prompt_logprobs=None)])
            of = "processed_logprobs" if logprobs_mode.startswith("processed") else "raw_logprobs"
            want = expected(model(), request.prompt, params, logprobs_mode=of)
            assert list(output.outputs[0].token_ids) == want.token_ids
            for entry, token in zip(output.outputs[0].logprobs, want.tokens, strict=True):
                values = {other: x.logprob for other, x in entry.items()}
                if logprobs_mode.endswith("logits"):  # they differ from log-probabilities by a constant
                    shift = values[token.id] - token.logprob
                    values = {other: value - shift for other, value in values.items()}
                for other, value in [(token.id, token.logprob), *token.top]:
                    if value > -torch.inf:  # filtered ones are all alike
                        assert values[other] == pytest.approx(value, abs=1e-3)


def test_prompt_logprobs_in_chunks_beside_others() -> None:
    """Prompts longer than a step's budget, some of them rated, some not, in every mode."""
    rng = random.Random(5)
    prompts = [draw_prompt(rng, (150, 200, 17, 2)) for _ in range(12)]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            prompt_logprobs=(None, 0, 2)[i % 3],
            extra_args={"diffusion_mode": ("mask_diffusion", "ar")[i % 2]},
        )
        for i in range(len(prompts))
    ]
    with running_engine(CHECKPOINT, max_num_seqs=4, max_num_batched_tokens=64, long_prefill_token_threshold=50) as llm:
        outputs = generate(llm, prompts, params)
        for prompt, param, output in zip(prompts, params, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == expected(model(), prompt, param).token_ids
            if param.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert_prompt_logprobs(output, prompt)
        assert_idle(llm)


def test_log_probabilities_of_the_whole_vocabulary() -> None:
    with running_engine(CHECKPOINT, max_logprobs=-1) as llm:
        for mode in ("mask_diffusion", "ar"):
            params = SamplingParams(
                temperature=0, max_tokens=18, ignore_eos=True, logprobs=-1, extra_args={"diffusion_mode": mode}
            )
            [output] = generate(llm, [[5, 60, 7]], [params])
            want = expected(model(), [5, 60, 7], params)
            assert_logprobs(output.outputs[0].logprobs, want)


def test_a_strategy_from_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's strategy beside the built-in ones in one batch: left to right, one token a pass."""
    install_left_to_right(tmp_path, monkeypatch)
    try:
        with running_engine(CHECKPOINT) as llm:
            prompt = [5, 60, 7]
            params = [
                SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=extra)
                for extra in (
                    {"diffusion_strategy": "left_to_right"},
                    {"diffusion_strategy": "left_to_right", "diffusion_max_steps": 3},
                    {},
                )
            ]
            mine, hurried, others = tokens_of(generate(llm, [prompt] * 3, params))
            assert list(others) == expected(model(), prompt, params[2]).token_ids
            assert list(mine) == left_to_right(prompt, 16)
            assert list(hurried) == left_to_right(prompt, 3)
    finally:
        strategies.cache_clear()


@torch.inference_mode()
def left_to_right(prompt: list[int], passes: int) -> list[int]:
    """A block of 16 by the strategy of docs/requests.md, pass by pass; the last one takes all that is left."""
    _, state = model().advance_context(torch.tensor([prompt]), None)
    canvas = torch.full((16,), 3)
    for i in range(passes):
        logits = model().denoiser_logits(canvas, state, torch.tensor([(16 - i) / 16]))
        logits[:, 3] = -torch.inf
        end = i + 1 if i < passes - 1 else 16
        canvas[i:end] = logits[i:end].argmax(-1)
    return canvas.tolist()
