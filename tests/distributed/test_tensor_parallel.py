"""Two tensor-parallel ranks, over processes and over Ray, give what one rank and the reference give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_data
import pytest
from oracle import expected
from ray_clusters import running_cluster
from serving import server_environment
from two_ranks import MODES, PROBLEMS, random_requests, reference_answers
from vllm.tokenizers import get_tokenizer

from vllm_twotower.reference import TwoTowerModel

TESTS = Path(__file__).parents[1]
CHECKPOINTS = {"mp": ("B", "C", "trained"), "ray": ("C",)}
"""By executor: what differs between them does not depend on the checkpoint. test_ray_serving.py has the trained one."""
SCORES = 3
"""The width of what ranks exchange of their logits: the largest, its token, the logsumexp."""


@pytest.fixture(scope="module", params=["mp", pytest.param("ray", marks=pytest.mark.ray)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What two_ranks.py writes, by checkpoint."""
    output = tmp_path_factory.mktemp("two-ranks") / "results.json"
    checkpoints = CHECKPOINTS[request.param]
    command = [sys.executable, str(TESTS / "two_ranks.py"), request.param, str(output), *checkpoints]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    if request.param == "ray":
        with running_cluster(2, PYTHONPATH=str(TESTS)) as variables:
            run(command, environment | variables)
    else:
        run(command, environment | server_environment())
    results = json.loads(output.read_text())
    assert tuple(results) == checkpoints
    return results


def run(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]


def test_goldens(results: dict[str, Any]) -> None:
    for name in results.keys() - {"trained"}:
        runs = golden_data.diffusion_runs(name) + golden_data.diffusion_runs(name, "eos_runs")
        assert results[name]["diffusion"] == [list(run.tokens) for run in runs]
        assert results[name]["ar"] == [prompt["ar"]["new_ids"] for prompt in golden_data.prompts(name)]


@pytest.mark.parametrize("results", ["mp"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_trained_model(results: dict[str, Any], mode: str) -> None:
    assert results["trained"][mode] == reference_answers(mode, PROBLEMS)


def test_random_requests(results: dict[str, Any]) -> None:
    """Seeds, filters, rules and strategies: every rank takes the decisions of the oracle, which knows no ranks."""
    checkpoint = golden_data.checkpoint("C")
    model, tokenizer = TwoTowerModel.from_pretrained(checkpoint), get_tokenizer(str(checkpoint))
    want = [expected(model, one.prompt, one.params(tokenizer)).token_ids for one in random_requests()]
    assert results["C"]["random"] == want


def test_greedy_exchanges_do_not_grow_with_the_vocabulary(results: dict[str, Any]) -> None:
    """Of logits only three numbers a row; everything else is as wide as the hidden states."""
    for name, of_checkpoint in results.items():
        hidden = 192 if name == "trained" else 64
        sums = {f"all_reduce {hidden}", "all_reduce 1"}  # 1: the square means of a Mamba norm whose group ranks share
        for exchanged in of_checkpoint["greedy_exchanges"]:
            assert f"all_gather {SCORES}" in exchanged
            assert set(exchanged) <= {f"all_gather {SCORES}", *sums}
    vocabulary = 320
    assert any(f"all_gather {vocabulary // 2}" in exchanged for exchanged in results["C"]["random_exchanges"])
