"""`vllm-twotower eval` on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_twotower.evaluation.answers import held_out_problems

REPOSITORY = Path(__file__).parents[2]
PROBLEMS = 24


OPTIONS = (
    f"--problems {PROBLEMS} --thresholds 0.8 1.0 --steps 2 --draft-steps 1 2 --widths 8 32"
    " --speed-problems 2 --rounds 1 --likelihood-problems 6 --max-tokens 48 --dtype float32"
)


def evaluate(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command; in a process of its own, since an engine may run in this one."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_twotower.cli", "eval", str(REPOSITORY / "models" / "tiny-twotower"), "--output"]
        + [str(folder), *OPTIONS.split()],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # spares its engines processes of their own
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's folder."""
    folder = tmp_path_factory.mktemp("evaluation") / "results"
    evaluate(folder)
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_every_score_counts_every_problem(results: dict):
    scores = [*results["reported"].values(), *results["thresholds"].values()]
    scores += [*results["steps"].values(), *results["drafts"].values(), *results["widths"].values()]
    assert len(scores) == 4 + 2 + 1 + 3 + 2
    for one in scores:
        assert one["problems"] == PROBLEMS
        assert sum(right for right, _ in one["right_by_family"].values()) == one["right"] <= PROBLEMS
        assert sum(asked for _, asked in one["right_by_family"].values()) == PROBLEMS
        assert one["tokens"] > 0
    _, reported = held_out_problems(PROBLEMS, 0)
    for family, (_, asked) in results["reported"]["ar"]["right_by_family"].items():
        assert asked == sum(problem.family == family for problem in reported)


def test_passes_follow_the_settings(results: dict):
    reported, widths = results["reported"], results["widths"]
    assert reported["ar"]["tokens_per_pass"] <= 1
    assert not reported["ar"]["passes_per_block"]
    # One token a pass, and the EOS tokens that fill a last block.
    assert reported["threshold 1"]["passes"] >= reported["threshold 1"]["tokens"]
    assert results["thresholds"]["0.8"]["tokens_per_pass"] > results["thresholds"]["1"]["tokens_per_pass"]
    assert results["steps"]["2"]["tokens_per_pass"] > 4
    assert max(map(int, results["steps"]["2"]["passes_per_block"])) <= 2
    assert sum(widths["8"]["passes_per_block"].values()) > sum(widths["32"]["passes_per_block"].values())
    assert results["speed"]["ar"] > 0


def test_verified_texts_are_those_of_ar(results: dict):
    verified = [results["reported"]["verified"], *results["drafts"].values()]
    assert [one["identical"] for one in verified] == [PROBLEMS] * 4
    assert [one["right"] for one in verified] == [results["reported"]["ar"]["right"]] * 4
    assert all(one["accepted_per_draft"] > 8 and one["tokens_per_pass"] > 2 for one in verified)
    assert results["reported"]["threshold 0.8"]["identical"] <= PROBLEMS


def test_the_rest_is_written(output: Path, results: dict):
    found = results["likelihood"]
    assert 0 < found["context"] < found["denoiser_bound"]
    assert len(found["by_offset"]) == 16
    unmasking = results["reported"]["threshold 0.8"]["unmasking"]
    assert sum(map(sum, unmasking)) == results["reported"]["threshold 0.8"]["tokens"]
    ablations = results["ablations"]
    assert [one["problems"] for one in ablations.values()] == [6] * 4
    assert ablations["no Mamba states of the context"]["right"] < ablations["as trained"]["right"] <= 6
    text = (output / "results.md").read_text()
    assert f"of {PROBLEMS}" in text
    assert "| threshold | right |" in text
    for name in ("quality.png", "steps_per_block.png", "unmasking.png", "agreement.png", "ablations.png"):
        assert (output / name).stat().st_size > 5000


def test_the_same_command_measures_nothing_again(output: Path, results: dict):
    done = evaluate(output)
    assert "answers" not in done.stderr  # no bar
    assert json.loads((output / "results.json").read_text()) == results  # the speeds too
