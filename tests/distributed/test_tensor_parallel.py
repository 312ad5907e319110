"""Two tensor-parallel ranks over processes give what one rank and the reference give; test_ray_serving.py has Ray's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_data
import pytest
from oracle import expected
from serving import server_environment
from two_ranks import MODES, PROBLEMS, PROMPTS, TRAINED, random_requests, trained_params
from vllm.tokenizers import get_tokenizer

from vllm_twotower.quantize import Recipe, quantize
from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion

CHECKPOINTS = ("B", "C", "trained", "C alone")
PROGRAM = Path(__file__).parents[1] / "two_ranks.py"
SCORES = 3
"""The width of what ranks exchange of their logits: the largest, its token, the logsumexp."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two_ranks.py writes, by checkpoint."""
    folder = tmp_path_factory.mktemp("two-ranks")
    output, quantized = folder / "results.json", folder / "quantized"
    quantize(golden_data.checkpoint("B"), quantized, Recipe("int4", "fp8", 16))
    command = [sys.executable, str(PROGRAM), str(output), *CHECKPOINTS, str(quantized)]
    process = subprocess.run(command, env=server_environment(), capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
    results = json.loads(output.read_text())
    results["quantized"] = {**results.pop(str(quantized)), "folder": quantized}
    assert tuple(results) == (*CHECKPOINTS, "quantized")
    return results


@pytest.mark.parametrize("name", ["B", "C"])
def test_goldens(results: dict[str, Any], name: str) -> None:
    runs = golden_data.diffusion_runs(name) + golden_data.diffusion_runs(name, "eos_runs")
    assert results[name]["diffusion"] == [list(run.tokens) for run in runs]
    assert results[name]["ar"] == [prompt["ar"]["new_ids"] for prompt in golden_data.prompts(name)]


def test_context_tower_alone(results: dict[str, Any]) -> None:
    assert results["C alone"]["ar"] == [prompt["ar"]["new_ids"] for prompt in golden_data.prompts("C")]


@pytest.mark.parametrize("mode", MODES)
def test_trained_model(results: dict[str, Any], mode: str) -> None:
    model, tokenizer = TwoTowerModel.from_pretrained(TRAINED), get_tokenizer(str(TRAINED))
    want = [
        expected(model, tokenizer.encode(problem), trained_params("ar" if mode == "verified" else mode)).token_ids
        for problem in PROBLEMS
    ]
    assert results["trained"][mode] == want


def test_quantized_experts(results: dict[str, Any]) -> None:
    """Each rank has its part of their values, and of their groups' scales."""
    model = TwoTowerModel.from_pretrained(results["quantized"]["folder"])
    want = [
        list(generate_mask_diffusion(model, prompt, 40, block_size=16, steps=16, gamma=0.8).tokens)
        for prompt in PROMPTS
    ]
    assert results["quantized"]["diffusion"] == want


def test_random_requests(results: dict[str, Any]) -> None:
    """Seeds, filters, rules and strategies: every rank takes the decisions of the oracle, which knows no ranks."""
    checkpoint = golden_data.checkpoint("C")
    model, tokenizer = TwoTowerModel.from_pretrained(checkpoint), get_tokenizer(str(checkpoint))
    want = [expected(model, one.prompt, one.params(tokenizer)).token_ids for one in random_requests()]
    assert results["C"]["random"] == want


def test_greedy_exchanges_do_not_grow_with_the_vocabulary(results: dict[str, Any]) -> None:
    """Of logits only three numbers a row; everything else is as wide as the hidden states."""
    for name, found in results.items():
        hidden = 192 if name == "trained" else 64
        sums = {f"all_reduce {hidden}", "all_reduce 1"}  # 1: the square means of a Mamba norm whose group ranks share
        for exchanged in found["greedy_exchanges"]:
            assert f"all_gather {SCORES}" in exchanged
            assert set(exchanged) <= {f"all_gather {SCORES}", *sums}
    vocabulary = 320
    assert any(f"all_gather {vocabulary // 2}" in exchanged for exchanged in results["C"]["random_exchanges"])
