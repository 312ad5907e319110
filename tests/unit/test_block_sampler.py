"""The block sampler's pure functions, against the plain reference and against the distributions they draw from."""

from __future__ import annotations

import pytest
import torch

from vllm_twotower.engine.block_sampler import MASKED_LOGIT, confidence_unmasking, draw, predict, probability, uniform
from vllm_twotower.engine.request_table import RowOptions
from vllm_twotower.reference import unmask_confident

MASK, VOCABULARY, WIDTH = 3, 50, 16


def row_options(rows: int, **columns: list) -> RowOptions:
    defaults = {
        "max_steps": 16,
        "confidence_threshold": 0.8,
        "temperature": 1.0,
        "top_k": VOCABULARY,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
    }
    return RowOptions(**{name: torch.tensor(columns.get(name, [value] * rows)) for name, value in defaults.items()})


@pytest.mark.parametrize("seed", range(20))
def test_unmasking_equals_the_reference_row_by_row(seed: int) -> None:
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
    prediction, confidence = (x.view(rows, WIDTH) for x in predict(suppressed.flatten(0, 1)))
    options = row_options(rows, max_steps=max_steps.tolist(), confidence_threshold=threshold.tolist())
    masked = (canvas == MASK) & valid
    commit = confidence_unmasking(confidence, masked, step, options)
    got = torch.where(commit & masked, prediction, canvas)

    for i, width in enumerate(widths.tolist()):
        expected = unmask_confident(
            logits[i, :width], canvas[i, :width], int(step[i]), int(max_steps[i]), float(threshold[i]), MASK
        )
        assert got[i, :width].tolist() == expected.tolist()
    assert torch.equal(got[~valid], canvas[~valid])


def test_equal_confidences_are_committed_in_order() -> None:
    confidence = torch.full((1, 8), 0.5)
    commit = confidence_unmasking(
        confidence, torch.ones(1, 8, dtype=torch.bool), torch.tensor([0]), row_options(1, max_steps=[4])
    )
    assert commit.tolist() == [[True, True] + [False] * 6]


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence, masked = torch.rand(9, 16, generator=generator), torch.rand(9, 16, generator=generator) < 0.6
    step, options = torch.arange(9), row_options(9, confidence_threshold=[0.1 * i + 0.1 for i in range(9)])
    together = confidence_unmasking(confidence, masked, step, options)
    for i in range(9):
        row = torch.tensor([i])
        alone = confidence_unmasking(confidence[row], masked[row], step[row], options.rows(row))
        assert torch.equal(alone[0], together[i])


def test_uniform_numbers_depend_on_every_counter_and_nothing_else() -> None:
    grid = (
        torch.stack(torch.meshgrid(*(torch.arange(n) for n in (7, 11, 5, 16)), indexing="ij"), -1).view(-1, 4).unbind(1)
    )
    numbers = uniform(*grid)
    assert len(numbers.unique()) == len(numbers)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    one = uniform(*(column[1234:1235] for column in grid))
    assert torch.equal(one, numbers[1234:1235])


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = uniform(torch.arange(100)[:, None], torch.arange(1000)).flatten()
    counts = torch.histc(numbers.float(), 20, 0, 1).double()
    chi_square = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi_square < 43.8  # 0.1 % of chi-square with 19 degrees of freedom
    pairs = torch.stack((numbers[:-1], numbers[1:]))
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01


@pytest.mark.parametrize(
    ("columns", "allowed"),
    [
        ({}, lambda p: p > 0),
        ({"temperature": 0.5}, lambda p: p > 0),
        ({"top_k": 3}, lambda p: p >= p.sort(descending=True).values[2]),
        (
            {"top_p": 0.6},
            lambda p: (
                p.sort(descending=True)
                .values.cumsum(0)
                .sub(p.sort(descending=True).values)[p.argsort(descending=True).argsort()]
                < 0.6
            ),
        ),
        ({"min_p": 0.3}, lambda p: p >= 0.3 * p.max()),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_draws_follow_the_filtered_distribution(columns: dict, allowed) -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0])
    expected = (logits / columns.get("temperature", 1)).softmax(0).double()
    expected = expected.masked_fill(~allowed(expected), 0)
    expected = expected / expected.sum() * draws
    columns = {"top_k": len(logits), **columns}
    options = row_options(draws, **{name: [value] * draws for name, value in columns.items()})
    number = uniform(torch.zeros(draws, dtype=torch.int64), torch.arange(draws))
    counts = draw(logits.expand(draws, -1), options, number).bincount(minlength=8).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 18.5  # 1 % of chi-square with 7 degrees of freedom


def test_probability_is_neither_tempered_nor_filtered() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 3, 8, 1, 1])
    torch.testing.assert_close(probability(logits, tokens), logits.softmax(-1)[torch.arange(5), tokens])
