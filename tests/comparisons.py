"""What outputs with log-probabilities are compared by, shared by the tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import golden_data
import pytest
from engines import tokens_of
from oracle import Expected, prompt_logprobs
from vllm import RequestOutput

from vllm_twotower.reference import TwoTowerModel


@cache
def model() -> TwoTowerModel:
    """The plain model of checkpoint A."""
    return TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))


def assert_same(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> None:
    """Equal tokens, reasons and ranks, and log-probabilities up to rounding, which depends on the batch."""
    assert tokens_of(outputs) == tokens_of(others)
    for output, other in zip(outputs, others, strict=True):
        [a], [b] = output.outputs, other.outputs
        assert (a.finish_reason, a.stop_reason, a.text) == (b.finish_reason, b.stop_reason, b.text)
        for mine, its in ((a.logprobs, b.logprobs), (output.prompt_logprobs, other.prompt_logprobs)):
            assert (mine is None) == (its is None)
            for x, y in zip(mine or (), its or (), strict=True):
                assert (x is None) == (y is None)
                for token in x or ():
                    assert x[token].rank == y[token].rank
                    assert x[token].logprob == pytest.approx(y[token].logprob, abs=1e-4)


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
