"""NVIDIA's outputs through vLLM's engine: tokens, number of passes, every canvas and time, and the first logits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import golden_data
import numpy as np
import pytest
from engines import assert_idle, generate, run_all, runner, running_engine, tokens_of, traced
from vllm import LLM, SamplingParams

from vllm_twotower.model.step_logits import OutputHead


@dataclass
class Served:
    name: str
    llm: LLM
    is_default: bool
    """Whether blocks are denoised as by default."""


# The denoiser passes of an engine step.
DEFAULT = "auto"
STEPS = {"A": [DEFAULT, 1, 4], "B": [DEFAULT, 16], "C": [DEFAULT, 1]}


@pytest.fixture(
    scope="module",
    params=[(name, steps) for name in golden_data.CHECKPOINTS for steps in STEPS[name]],
    ids=lambda param: "-".join(map(str, param)),
)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    name, steps = request.param
    with running_engine(golden_data.checkpoint(name), {"denoise_steps_per_engine_step": steps}) as llm:
        yield Served(name, llm, steps == DEFAULT)
        assert_idle(llm)


def autoregressive(**overrides: Any) -> SamplingParams:
    """The golden records' settings of autoregressive requests."""
    return SamplingParams(
        temperature=0, max_tokens=32, ignore_eos=True, extra_args={"diffusion_mode": "ar"}, **overrides
    )


def test_all_at_once(served: Served) -> None:
    runs = golden_data.diffusion_runs(served.name) + golden_data.diffusion_runs(served.name, "eos_runs")
    assert run_all(served.llm, runs) == [run.tokens for run in runs]


def test_small_tiles_of_logits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two canvases' logits at a time, also for rows whose next token is drawn."""
    model, heads, logits = runner(served.llm).model, [], OutputHead.__call__
    monkeypatch.setattr(OutputHead, "__call__", lambda head, hidden: heads.append(len(hidden)) or logits(head, hidden))
    monkeypatch.setattr(model, "logit_tile", 33)
    runs = golden_data.diffusion_runs(served.name)
    assert run_all(served.llm, runs) == [run.tokens for run in runs]
    prompts = golden_data.prompts(served.name)
    outputs = generate(served.llm, [prompt["ids"] for prompt in prompts] * 4, [autoregressive()] * 4 * len(prompts))
    assert tokens_of(outputs) == [tuple(prompt["ar"]["new_ids"]) for prompt in prompts] * 4
    assert 16 < max(heads) <= 33


def test_shuffled(served: Served) -> None:
    runs = golden_data.diffusion_runs(served.name)
    random.Random(0).shuffle(runs)
    assert run_all(served.llm, runs) == [run.tokens for run in runs]


def test_alone_with_every_step(served: Served) -> None:
    """Each run by itself: the tokens, and for each pass t, the canvas before and after, and the first logits."""
    compared = 0
    for run in golden_data.diffusion_runs(served.name):
        with traced(served.llm) as trace:
            [output] = generate(served.llm, [run.prompt], [run.params()])
        assert tokens_of([output]) == [run.tokens]
        steps = trace.of(output)
        assert len(steps) == run.nfe
        expected = [step for block in run.blocks for step in block]
        assert [(step.t, step.canvas_in, step.canvas_out) for step in steps] == expected

        firsts = np.cumsum([0, *map(len, run.blocks)])
        for (block, index), logits in golden_data.recorded_logits(served.name, run).items():
            got = steps[firsts[block] + index].logits.numpy()
            got[:, run.mask_token_id] = logits[:, run.mask_token_id]  # recorded after its suppression
            np.testing.assert_allclose(got, logits, atol=1e-3, rtol=0)
            compared += 1
    assert compared > 60


def test_autoregressive(served: Served) -> None:
    prompts = golden_data.prompts(served.name)
    outputs = generate(served.llm, [prompt["ids"] for prompt in prompts], [autoregressive()] * len(prompts))
    assert tokens_of(outputs) == [tuple(prompt["ar"]["new_ids"]) for prompt in prompts]
    for prompt in prompts if served.is_default else ():  # alone
        outputs = generate(served.llm, [prompt["ids"]], [autoregressive()])
        assert tokens_of(outputs) == [tuple(prompt["ar"]["new_ids"])]


def test_modes_mixed_in_one_batch(served: Served) -> None:
    """Diffusion and autoregressive requests beside each other, the latter stopping at their EOS."""
    runs = golden_data.diffusion_runs(served.name)[::3]
    prompts, params, expected = [], [], []
    for run in runs:
        prompts.append(run.prompt)
        params.append(run.params())
        expected.append(run.tokens)
    for prompt in golden_data.prompts(served.name):
        for record in prompt.get("eos_runs", ()):
            if record["mode"] == "ar":
                prompts.append(prompt["ids"])
                params.append(autoregressive(stop_token_ids=[record["eos_token_id"]]))
                expected.append(tuple(record["new_ids"]))
    assert {param.extra_args.get("diffusion_mode") for param in params} == {None, "ar"}
    order = list(range(len(prompts)))
    random.Random(1).shuffle(order)
    outputs = generate(served.llm, [prompts[i] for i in order], [params[i] for i in order])
    assert tokens_of(outputs) == [expected[i] for i in order]


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_another_mask_token(name: str) -> None:
    """With a mask token that the model likes to predict, its logit must be suppressed."""
    for run in golden_data.diffusion_runs(name, "alt_mask_runs"):
        with running_engine(golden_data.checkpoint(name), {"mask_token_id": run.mask_token_id}) as llm:
            assert run_all(llm, [run]) == [run.tokens]
