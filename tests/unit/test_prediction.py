"""Predictions: pure functions, against the distributions they draw from."""

from __future__ import annotations

import pytest
import torch
from row_options import row_options

from vllm_twotower.kernels import uniform
from vllm_twotower.sampling.prediction import draw, margin, probability, temper_and_filter
from vllm_twotower.sampling.row_options import RowOptions


def filtered(logits: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """On a GPU where there is one: vLLM's filters are Triton's there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = RowOptions(**{name: column.to(device) for name, column in vars(options).items()})
    return temper_and_filter(logits.to(device), moved).cpu()


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
    assert torch.equal(uniform(*(column.int() for column in grid)), numbers)


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
    counts = draw(filtered(logits.expand(draws, -1), options), number).bincount(minlength=8).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 18.5  # 1 % of chi-square with 7 degrees of freedom


def test_min_p_is_applied_before_top_p() -> None:
    """As in vLLM: top-p counts what min-p has left, so the two together drop more than each alone."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    options = row_options(1, top_k=[4], min_p=[0.5], top_p=[0.6])
    assert filtered(logits, options).isfinite().tolist() == [[True, False, False, False]]
    alone = row_options(1, top_k=[4], top_p=[0.6])
    assert filtered(logits, alone).isfinite().tolist() == [[True, True, False, False]]


def test_probability_is_neither_tempered_nor_filtered() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 3, 8, 1, 1])
    torch.testing.assert_close(probability(logits, tokens), logits.softmax(-1)[torch.arange(5), tokens])


def test_margin_is_between_the_two_most_probable() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]).log()
    torch.testing.assert_close(margin(logits), torch.tensor([0.2, 0.7]))
