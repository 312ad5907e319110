"""The strategies: what they commit and when, row by row, and how a user adds one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from row_options import row_options
from strategy_plugin import install_left_to_right

from vllm_twotower.options import EngineOptions, RequestError, RequestOptions
from vllm_twotower.reference import unmask_confident
from vllm_twotower.sampling.prediction import MASKED_LOGIT
from vllm_twotower.sampling.strategies import (
    NOISE_SCHEDULES,
    REMASKING_SCORES,
    Commit,
    DenoiserPass,
    alpha,
    confidence_unmasking,
    grid_time,
    posterior,
    predict_and_noise,
    scheduled_time,
    strategies,
)

MASK, VOCABULARY, WIDTH = 3, 50, 16


def denoiser_pass(masked: torch.Tensor, step: torch.Tensor, **columns: torch.Tensor) -> DenoiserPass:
    """A pass over canvases (R, S) with random predictions; ``columns`` override."""
    rows, width = masked.shape
    generator = torch.Generator().manual_seed(int(masked.sum()))
    confidence = torch.rand(rows, width, generator=generator)
    defaults = {
        "prediction": torch.randint(4, VOCABULARY, (rows, width), generator=generator),
        "confidence": confidence,
        "start": torch.arange(rows) * 100,
        "width": torch.full((rows,), width),
        "margin": confidence / 2,
        "energy": confidence.log(),
    }
    return DenoiserPass(masked=masked, step=step, **(defaults | columns))


@pytest.mark.parametrize("seed", range(20))
def test_confidence_unmasking_equals_the_reference_row_by_row(seed: int) -> None:
    """Random canvases of mixed widths, thresholds and step numbers, all rows at once."""
    generator = torch.Generator().manual_seed(seed)
    rows = 12
    widths = torch.randint(1, WIDTH + 1, (rows,), generator=generator)
    max_steps = torch.randint(1, 17, (rows,), generator=generator)
    step = (torch.rand(rows, generator=generator) * max_steps).long()
    threshold = torch.rand(rows, generator=generator) * 0.9 + 0.1
    canvas = torch.randint(4, VOCABULARY, (rows, WIDTH), generator=generator)
    canvas[torch.rand(rows, WIDTH, generator=generator) < 0.7] = MASK
    canvas[:, 0] = MASK
    logits = 3 * torch.randn(rows, WIDTH, VOCABULARY, generator=generator)

    valid = torch.arange(WIDTH) < widths[:, None]
    suppressed = logits.clone()
    suppressed[..., MASK] = MASKED_LOGIT
    confidence, prediction = suppressed.softmax(-1).max(-1)
    options = row_options(rows, max_steps=max_steps.tolist(), confidence_threshold=threshold.tolist())
    masked = (canvas == MASK) & valid
    denoised = denoiser_pass(masked, step, prediction=prediction, confidence=confidence)
    got = torch.where(confidence_unmasking(denoised, options).positions, prediction, canvas)

    for i, width in enumerate(widths.tolist()):
        expected = unmask_confident(
            logits[i, :width], canvas[i, :width], int(step[i]), int(max_steps[i]), float(threshold[i]), MASK
        )
        assert got[i, :width].tolist() == expected.tolist()
    assert torch.equal(got[~valid], canvas[~valid])


def test_equal_confidences_are_committed_in_order() -> None:
    denoised = denoiser_pass(torch.ones(1, 8, dtype=torch.bool), torch.tensor([0]), confidence=torch.full((1, 8), 0.5))
    commit = confidence_unmasking(denoised, row_options(1, max_steps=[4]))
    assert commit.positions.tolist() == [[True, True] + [False] * 6]


@pytest.mark.parametrize("name", ["confidence_unmasking", "predict_and_noise", "posterior"])
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 24
    masked = torch.rand(rows, WIDTH, generator=generator) < 0.6
    masked[:, 3] = True
    denoised = denoiser_pass(masked, torch.arange(rows) % 16)
    options = row_options(
        rows,
        confidence_threshold=[0.04 * i + 0.04 for i in range(rows)],
        max_steps=[16 - i % 3 for i in range(rows)],
        noise_schedule=[i % 3 for i in range(rows)],
        adaptive_unmasking=[i % 2 == 0 for i in range(rows)],
        remasking=[i % 3 for i in range(rows)],
        temperature=[0.5 * (i % 3) for i in range(rows)],
        seed=list(range(rows)),
    )
    together = strategies()[name].commit(denoised, options)
    for i in range(rows):
        row = torch.tensor([i])
        alone = strategies()[name].commit(denoised.rows(row), options.rows(row))
        assert torch.equal(alone.positions[0], together.positions[i])
        assert alone.step[0] == together.step[i]


@pytest.mark.parametrize("name", ["confidence_unmasking", "predict_and_noise", "posterior"])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 16, 32])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_pass_commits_and_the_last_one_all(name: str, max_steps: int, temperature: float) -> None:
    strategy = strategies()[name]
    for schedule in range(len(NOISE_SCHEDULES)):
        for remasking in range(len(REMASKING_SCORES)):
            for adaptive in (False, True):
                options = row_options(
                    1,
                    max_steps=[max_steps],
                    noise_schedule=[schedule],
                    remasking=[remasking],
                    adaptive_unmasking=[adaptive],
                    temperature=[temperature],
                )
                masked, step, passes = torch.ones(1, WIDTH, dtype=torch.bool), torch.tensor([0]), 0
                while masked.any():
                    commit = strategy.commit(denoiser_pass(masked, step), options)
                    assert (commit.positions & masked).any()
                    assert not (commit.positions & ~masked).any()
                    masked, step, passes = masked & ~commit.positions, commit.step + 1, passes + 1
                assert passes <= max_steps
                assert int(step) <= max_steps


def test_noise_schedules_run_from_clean_to_masked() -> None:
    t = torch.linspace(0, 1, 50).double()
    for index in range(len(NOISE_SCHEDULES)):
        values = alpha(t[None], row_options(1, noise_schedule=[index]))[0]
        assert values[0] == pytest.approx(1)
        assert values[-1] == pytest.approx(0, abs=1e-12)
        assert (values.diff() < 0).all()
    cosine = alpha(torch.tensor([0.5]).double(), row_options(1, noise_schedule=[1]))
    assert float(cosine) == pytest.approx(math.sqrt(0.5))


def test_scheduled_time_is_the_masked_share_of_the_schedule() -> None:
    steps = torch.arange(16)
    options = row_options(16, noise_schedule=[0] * 16)
    expected = 1 - steps * (1 - 1e-5) / 16
    torch.testing.assert_close(scheduled_time(torch.zeros(16), steps, options), expected, atol=1e-6, rtol=0)
    beyond = scheduled_time(torch.zeros(1), torch.tensor([40]), row_options(1))
    torch.testing.assert_close(beyond, expected[-1:], atol=1e-6, rtol=0)


def test_predict_and_noise_leaves_what_the_schedule_does() -> None:
    """Linear, 8 of 16 steps a block: two a step; the lowest-ranked stay masked."""
    masked = torch.ones(1, WIDTH, dtype=torch.bool)
    options = row_options(1, max_steps=[8])
    for step in range(8):
        denoised = denoiser_pass(masked, torch.tensor([step]))
        positions = predict_and_noise(denoised, options).positions
        assert int(positions.sum()) == 2
        left = masked & ~positions
        if left.any():
            assert denoised.confidence[positions].min() > denoised.confidence[left].max()
        masked = left
    assert not masked.any()


def test_adaptive_unmasking_starts_slowly() -> None:
    masked, counts = torch.ones(1, WIDTH, dtype=torch.bool), []
    options = row_options(1, max_steps=[10], adaptive_unmasking=[True])
    for step in range(10):
        positions = predict_and_noise(denoiser_pass(masked, torch.tensor([step])), options).positions
        counts.append(int(positions.sum()))
        masked = masked & ~positions
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_remasking_by_margin_and_at_random() -> None:
    masked = torch.ones(1, WIDTH, dtype=torch.bool)
    margins = torch.arange(WIDTH).flip(0)[None] / WIDTH
    denoised = denoiser_pass(masked, torch.tensor([0]), margin=margins)
    options = row_options(1, max_steps=[4], remasking=[REMASKING_SCORES.index("margin")])
    assert predict_and_noise(denoised, options).positions.nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    draws = [
        predict_and_noise(denoised, row_options(1, max_steps=[4], remasking=[2], seed=[seed])).positions
        for seed in range(400)
    ]
    counts = torch.cat(draws).sum(0)
    assert int(counts.sum()) == 1600
    chi_square = float(((counts - 100.0) ** 2 / 100).sum())
    assert chi_square < 37.7  # 0.1 % of chi-square with 15 degrees of freedom


def test_posterior_commits_each_position_with_the_posterior_probability() -> None:
    """At temperature 1 without filters: r of the masked positions, whatever the prediction."""
    rows, step = 4000, 10
    masked = torch.ones(rows, 4, dtype=torch.bool)
    denoised = denoiser_pass(masked, torch.full((rows,), step), energy=torch.zeros(rows, 4))
    for schedule in range(3):
        options = row_options(rows, noise_schedule=[schedule] * rows, seed=list(range(rows)))
        commit = posterior(denoised, options)
        at_once = commit.step == step
        before, after = (
            float(alpha(grid_time(torch.tensor([step + i]), torch.tensor([16])), options.rows(torch.tensor([0]))))
            for i in (0, 1)
        )
        r = (after - before) / (1 - before)
        share = float((commit.positions & at_once[:, None]).double().mean())
        assert share == pytest.approx(r, abs=4 * math.sqrt(r * (1 - r) / (4 * rows)))
        assert float(at_once.double().mean()) == pytest.approx(1 - (1 - r) ** 4, abs=0.03)


def test_posterior_at_temperature_zero_takes_the_most_probable() -> None:
    """A token is committed where r p(token) exceeds the mask's 1 - r."""
    confidence = torch.tensor([[0.2, 0.4, 0.6, 0.9]])
    masked = torch.ones(1, 4, dtype=torch.bool)
    denoised = denoiser_pass(masked, torch.tensor([0]), confidence=confidence, energy=confidence.log())
    commit = posterior(denoised, row_options(1, temperature=[0.0]))
    # r = 1 / (16 - s): at s = 14 it is about 1/2, where no p < 1 exceeds the mask; at s = 15 everything goes.
    assert (int(commit.step), commit.positions.tolist()) == (15, [[True] * 4])
    one_step_more = row_options(1, temperature=[0.0], noise_schedule=[2])
    commit = posterior(denoised, one_step_more)
    r = {}
    for s in range(16):
        before, after = (
            float(alpha(grid_time(torch.tensor([s + i]), torch.tensor([16])), one_step_more)) for i in (0, 1)
        )
        r[s] = (after - before) / (1 - before)
    first = next(s for s in range(16) if r[s] * 0.9 > 1 - r[s] or s == 15)
    assert int(commit.step) == first


@pytest.fixture(autouse=True)
def forget_strategies() -> Iterator[None]:
    """What an entry point of a test added is gone after it."""
    yield
    strategies.cache_clear()


def test_a_strategy_from_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_left_to_right(tmp_path, monkeypatch)
    options = RequestOptions.parse({"diffusion_strategy": "left_to_right"}, EngineOptions())
    assert options.strategy == "left_to_right"
    with pytest.raises(RequestError, match="diffusion_confidence_threshold"):
        RequestOptions.parse(
            {"diffusion_strategy": "left_to_right", "diffusion_confidence_threshold": 0.5}, EngineOptions()
        )
    masked = torch.tensor([[False, True, True]])
    commit = strategies()["left_to_right"].commit(denoiser_pass(masked, torch.tensor([0])), row_options(1))
    assert isinstance(commit, Commit)
    assert commit.positions.tolist() == [[False, True, False]]


def test_an_entry_point_that_is_no_strategy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_left_to_right(tmp_path, monkeypatch, "wrong = left_to_right_strategy:commit")
    with pytest.raises(ValueError, match="left_to_right_strategy:commit.*must be a Strategy"):
        strategies()
