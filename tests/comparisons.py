"""What outputs with log-probabilities are compared by, shared by the tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import golden_data
import pytest
from engines import tokens_of
from oracle import Expected, prompt_logprobs
from vllm import RequestOutput
from vllm.logprobs import Logprob

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.trace import DiffusionTrace


@cache
def model() -> TwoTowerModel:
    """The plain model of checkpoint A."""
    return TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))


def assert_same(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput], large: bool = False) -> None:
    """Equal tokens and reasons, and log-probabilities up to rounding; more of it in ``large`` batches."""
    same_entries = assert_close_entries if large else assert_same_entries
    assert tokens_of(outputs) == tokens_of(others)
    for output, other in zip(outputs, others, strict=True):
        [a], [b] = output.outputs, other.outputs
        assert (a.finish_reason, a.stop_reason, a.text) == (b.finish_reason, b.stop_reason, b.text)
        for mine, its in ((a.logprobs, b.logprobs), (output.prompt_logprobs, other.prompt_logprobs)):
            assert (mine is None) == (its is None)
            for x, y in zip(mine or (), its or (), strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    same_entries(x, y)


def assert_same_entries(x: dict[int, Logprob], y: dict[int, Logprob]) -> None:
    """The log-probabilities of one position: the same tokens and ranks."""
    assert {token: entry.rank for token, entry in x.items()} == {token: entry.rank for token, entry in y.items()}
    for token, entry in x.items():
        assert entry.logprob == pytest.approx(y[token].logprob, abs=1e-4)


def assert_close_entries(x: dict[int, Logprob], y: dict[int, Logprob]) -> None:
    """The log-probabilities of one position: the same tokens and ranks, but for tokens that are as good as equal.

    Sums are rounded as the batch has it, so a request differs from itself in another batch, by up to 2e-4 after 150
    tokens of a model that was not trained.
    """
    rounding = 1e-3
    assert len(x) == len(y)
    for token in x.keys() & y.keys():
        assert abs(x[token].rank - y[token].rank) <= 1
        assert x[token].logprob == pytest.approx(y[token].logprob, abs=rounding)
    # The last of the top k, whichever it is; the chosen token may be less likely than all of them.
    others = [sorted(mine[token].logprob for token in mine.keys() - its.keys()) for mine, its in ((x, y), (y, x))]
    assert others[0] == pytest.approx(others[1], abs=rounding)


def assert_same_traces(one: DiffusionTrace, other: DiffusionTrace) -> None:
    """Equal but for the last bits of probabilities."""
    assert (one.block, one.decided_in, one.blocks) == (other.block, other.decided_in, other.blocks)
    assert one.confidence == pytest.approx(other.confidence, abs=2e-5)
    assert one.runner_up == pytest.approx(other.runner_up, abs=2e-5)


def assert_logprobs(logprobs: list, want: Expected) -> None:
    for entry, token in zip(logprobs, want.tokens, strict=True):
        assert entry[token.id].logprob == pytest.approx(token.logprob, abs=1e-3)
        assert entry[token.id].rank == token.rank
        for other, value in token.top:
            assert entry[other].logprob == pytest.approx(value, abs=1e-3)
        assert entry.keys() == {token.id, *(other for other, _ in token.top)}


def assert_prompt_logprobs(output: RequestOutput, prompt: Sequence[int]) -> None:
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for entry, (token, logprob, rank) in zip(output.prompt_logprobs[1:], prompt_logprobs(model(), prompt), strict=True):
        assert entry[token].logprob == pytest.approx(logprob, abs=1e-4)
        assert entry[token].rank == rank
