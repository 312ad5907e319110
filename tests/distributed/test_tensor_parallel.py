"""Two tensor-parallel ranks over processes give what one rank and the reference give; test_ray_serving.py has Ray's."""

from __future__ import annotations

import pytest
from serving import server_environment
from two_ranks import (
    MODES,
    PROBLEMS,
    Found,
    check_goldens,
    check_greedy_exchanges,
    check_random_requests,
    reference_answers,
    run_two_ranks,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    output = tmp_path_factory.mktemp("two-ranks") / "results.json"
    return run_two_ranks("mp", ("B", "C", "trained"), output, server_environment())


@pytest.mark.parametrize("name", ["B", "C"])
def test_goldens(results: dict[str, Found], name: str) -> None:
    check_goldens(name, results[name])


@pytest.mark.parametrize("mode", MODES)
def test_trained_model(results: dict[str, Found], mode: str) -> None:
    assert results["trained"][mode] == reference_answers(mode, PROBLEMS)


def test_random_requests(results: dict[str, Found]) -> None:
    check_random_requests(results["C"])


def test_greedy_exchanges(results: dict[str, Found]) -> None:
    for name, found in results.items():
        check_greedy_exchanges(name, found)
