"""Choosing a threshold, the problems to choose on, and likelihoods against cases with a known answer."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from ablated_reference import ablated

from vllm_twotower.architecture import TwoTowerConfig
from vllm_twotower.evaluation.answers import held_out_problems
from vllm_twotower.evaluation.cli import choose_threshold
from vllm_twotower.evaluation.likelihood import likelihood
from vllm_twotower.evaluation.report import draw, markdown
from vllm_twotower.experiments.measures import Result
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training.initialise import initialise

CONFIG = TwoTowerConfig(
    pattern="M*-",
    hidden_size=32,
    vocab_size=260,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=8,
    n_groups=1,
    conv_kernel=4,
    layer_norm_epsilon=1e-5,
    intermediate_size=32,
)


def score(right: int, passes: int) -> Result:
    return Result(1000, right, 4000, passes, {}, {}, [], None, 0, 0, 0, [])


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({0.5: score(940, 500), 0.8: score(947, 700), 1.0: score(950, 4000)}, 0.8),
        ({0.5: score(950, 500), 0.8: score(955, 700)}, 0.5),
        ({0.5: score(700, 500), 0.8: score(800, 700), 1.0: score(800, 4000)}, 0.8),
    ],
)
def test_the_fastest_threshold_that_keeps_the_quality(scores: dict[float, Result], chosen: float):
    assert choose_threshold(score(959, 4000), scores, retain=0.987) == chosen


def test_problems_are_held_out_and_do_not_overlap():
    to_choose, to_report = held_out_problems(300, 0)
    assert len(to_choose) == len(to_report) == 300
    assert all(problem.held_out for problem in to_choose + to_report)
    assert not {problem.question for problem in to_choose} & {problem.question for problem in to_report}
    assert held_out_problems(300, 0) == (to_choose, to_report)
    assert held_out_problems(300, 1)[0] != to_choose


def model(canvas_length: int) -> TwoTowerModel:
    """Untrained: the denoiser is the context tower."""
    made = TwoTowerModel(replace(CONFIG, canvas_length=canvas_length))
    initialise(made, 0)
    with torch.no_grad():
        made.context_lm_head.weight.mul_(30)
        made.lm_head.weight.mul_(30)
    return made.eval()


def encode(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def test_likelihoods_of_blocks_of_one_token():
    problems = held_out_problems(2, 0)[0]
    one = model(1)
    found = likelihood(one, problems, encode, 1, strata=400, seed=0)
    expected, bound, tokens = 0.0, 0.0, 0
    for problem in problems:
        prompt, answer = [1, *encode(problem.prompt)], [*encode(problem.answer), 2]
        text = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = one.context_logits(text).log_softmax(-1)[0]
            starts = torch.arange(len(prompt), text.shape[1])[None]
            masks = torch.full((1, len(answer), 1), 3)
            denoised = one.denoise_blocks(text, starts, masks, torch.ones(1, len(answer))).log_softmax(-1)[0, :, 0]
        expected -= sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
        bound -= sum(denoised[i, token].item() for i, token in enumerate(answer))
        tokens += len(answer)
    assert found.context == pytest.approx(expected / tokens, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(expected / tokens), rel=1e-3)
    assert found.by_offset == pytest.approx([bound / tokens], rel=1e-4)
    assert found.denoiser_bound == pytest.approx(bound / tokens, rel=0.1)  # at random t


def test_ablations_change_what_the_denoiser_sees_and_nothing_else():
    whole = model(4)
    prompt = [1, *encode("What is 3 + 4?")]
    _, state = whole.advance_context(torch.tensor([prompt]), None)
    canvas, t = torch.full((4,), 3), torch.ones(1)
    logits = {
        name: ablated(whole, **{name: value}).denoiser_logits(canvas, state, t)
        for name, value in {"mamba_seed": False, "context_kv": False, "time": 0.5, "skip_denoiser_layers": [2]}.items()
    }
    as_trained = whole.denoiser_logits(canvas, state, t)
    nothing_left = whole.denoiser_logits(canvas, None, t)
    for name in ("mamba_seed", "context_kv", "skip_denoiser_layers"):
        assert not torch.allclose(logits[name], as_trained, atol=1e-3)
        assert not torch.allclose(logits[name], nothing_left, atol=1e-3)
    without_both = ablated(whole, mamba_seed=False, context_kv=False)
    assert torch.equal(without_both.denoiser_logits(canvas, state, t), nothing_left)
    # An untrained time conditioning is neutral.
    assert torch.equal(logits["time"], as_trained)
    with torch.no_grad():
        whole.t_block[1].weight.normal_()
    frozen = ablated(whole, time=0.5)
    assert torch.equal(frozen.denoiser_logits(canvas, state, t), whole.denoiser_logits(canvas, state, t / 2))
    assert not torch.allclose(frozen.denoiser_logits(canvas, state, t), whole.denoiser_logits(canvas, state, t))


@pytest.mark.parametrize("chosen", [0.8, 1.0])
def test_a_report_for_any_threshold(tmp_path, chosen: float):
    one = asdict(replace(score(3, 2000), problems=4, passes_per_block={2: 5}, right_by_family={"addition": [3, 4]}))
    entry = one | {"accuracy": 0.75, "tokens_per_pass": 2.0, "accepted_per_draft": 6.5, "identical": 2}
    draft = entry | {"drafts": 10, "accepted": 65, "agreement": [[9, 10], [5, 9]]}
    results = {
        "model": "a-model", "dtype": "float32", "problems": 4, "max_tokens": 8, "retain": 0.99, "chosen": chosen,
        "chosen_on": {"ar": entry}, "thresholds": {f"{chosen:g}": entry}, "steps": {}, "widths": {},
        "drafts": {"1 | any": draft, "2 | 0.5": draft, "2 | 0.8": draft},
        "reported": {"ar": entry, f"threshold {chosen:g}": entry, "threshold 1": entry},
        "speed": {"ar": 2.0, f"threshold {chosen:g}": 5.0},
        "likelihood": {"context": 0.1, "perplexity": 1.1, "denoiser_bound": 0.2, "by_offset": [0.5]},
        "ablations": {"as trained": entry, "no seed": entry},
    }  # fmt: skip
    assert "| as trained | 3 of 4 | 75.0% |" in markdown(results)
    assert f"| threshold {chosen:g} | 3 of 4 | 75.0% | 100.0% | 2 | 2.00 | 5 | 2.50 |" in markdown(results)
    assert "| 2 | 0.8 | 6.50 | 2.00 | 2 |" in markdown(results)
    draw(results, tmp_path)
    for name in ("quality.png", "steps_per_block.png", "agreement.png", "ablations.png"):
        assert (tmp_path / name).stat().st_size > 1000
