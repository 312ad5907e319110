"""A short soak: `benchmarks/soak.py` with two hundred requests, compared with the answers of an idle server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import golden_data
import pytest
import soaking
from serving import Server, running_server
from soak_answers import RoundingJudge
from soak_requests import IS_BAD, LEAVES, draw_asked
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

SEED, REQUESTS, CLIENTS = 1, 200, 24


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Seats for two thirds of the clients, pages for fewer."""
    log = tmp_path_factory.mktemp("soak") / "crowded.log"
    with running_server(
        golden_data.checkpoint("A"), log, *soaking.UNDER_LOAD, environment=soaking.ENVIRONMENT
    ) as running:
        yield running


def test_answers_under_load_are_those_of_an_idle_server(
    crowded: Server, server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike, tmp_path: Path
) -> None:
    """Nor is anything left of the requests, a third of which are refused or left."""
    journal = soaking.Journal(tmp_path / "results.jsonl", {"seed": SEED})
    with soaking.faults_of(crowded) as faults:
        asyncio.run(soaking.load(crowded, SEED, range(REQUESTS), journal, CLIENTS))
    asyncio.run(soaking.compare_alone([server], SEED, range(REQUESTS), journal))
    summary = soaking.summarize(SEED, range(REQUESTS), journal, RoundingJudge(oracle, tokenizer))
    assert not faults + summary["faults"]
    clients = [draw_asked(SEED, index).client for index in range(REQUESTS)]
    assert summary["refused"] == clients.count(IS_BAD)
    assert 0 < summary["left"] <= clients.count(LEAVES)
    assert summary["compared"] == summary["answered"] == REQUESTS - summary["refused"] - summary["left"]
    assert all(summary[name] for name in soaking.MUST_HAPPEN)


def test_a_soak_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = soaking.Journal(path, {"seed": 1})
    for index in range(3):
        journal.add("load", index=index, outcome=soaking.LEFT)
    path.write_text(path.read_text()[:-5])
    again = soaking.Journal(path, {"seed": 1})
    assert again.asked() == {0, 1}
    again.add("load", index=2, outcome=soaking.REFUSED)
    assert soaking.Journal(path, {"seed": 1}).outcome(2)["outcome"] == soaking.REFUSED
    with pytest.raises(ValueError, match=r'was written with {"seed": 1}, not {"seed": 2}'):
        soaking.Journal(path, {"seed": 2})
