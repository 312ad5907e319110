"""`vllm-twotower experiment` on the embedded model: interrupted in the middle, then given again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

PROBLEMS = 16
CONTENT = {
    "problems": {"count": PROBLEMS},
    "max_tokens": 48,
    "engine": {"dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20},
    "sweeps": [
        {"name": "autoregressive", "mode": "ar"},
        {"name": "verified", "mode": "verified"},
        {"name": "threshold", "confidence_threshold": [0.8, 1.0]},
        {"name": "temperature", "temperature": 1.0, "seed": 3},
        {"name": "ablation", "ablation": [{}, {"context_kv": False}]},
    ],
}


def start(file: Path) -> subprocess.Popen:
    """In a group of its own, so that Ctrl-C reaches the engine's process too, as in a terminal."""
    # Where the tests are a shell's background job they ignore it, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_twotower.cli", "experiment", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def answers(output: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().splitlines() for file in (output / "answers").glob("*.jsonl")}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that was interrupted once."""
    folder = tmp_path_factory.mktemp("experiment")
    output, file = folder / "out", folder / "small.yaml"
    file.write_text(yaml.safe_dump(CONTENT | {"output": str(output)}))
    first = start(file)
    deadline = time.monotonic() + 120
    while sum(map(len, answers(output).values())) < PROBLEMS + 2:
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert errors.splitlines()[-1] == f"Interrupted: {output} keeps what is answered; the same command goes on."
    assert "Traceback" not in errors
    kept = answers(output)
    finished = (output / "results.jsonl").read_text().splitlines()
    assert 1 <= len(finished) < 6

    again = start(file)
    printed, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    assert printed.splitlines()[-1] == f"{output / 'report.md'}: 7 runs, 5 plots"
    assert re.search(r": no context KV \(\d of \d\): (\d+) of \1 answers, \d\d:\d\d gone, 00:00 left\n", errors)
    for name, lines in answers(output).items():
        assert len(lines) == PROBLEMS
        assert lines[: len(kept.get(name, []))] == kept.get(name, [])
    assert (output / "results.jsonl").read_text().splitlines()[: len(finished)] == finished
    return output


def test_every_problem_is_answered_once_in_every_run(output: Path):
    entries = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len(entries) == 6  # as trained is threshold 0.8
    for entry in entries:
        problems = [json.loads(line)["problem"] for line in answers(output)[f"{entry['key']}.jsonl"]]
        assert sorted(problems) == list(range(PROBLEMS))


def test_what_is_measured(output: Path):
    entries = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    found = {(entry["sweep"], entry["label"]): entry["result"] for entry in entries}
    ar, verified = found["autoregressive", "autoregressive"], found["verified", "verified"]
    assert ar["passes"] == ar["tokens"] == verified["tokens"]
    assert verified["passes"] < ar["passes"] / 3
    assert verified["right_by_family"] == ar["right_by_family"]
    assert sum(agreed for agreed, _ in verified["agreement"]) == verified["accepted"]
    one_by_one = found["threshold", "threshold 1"]
    assert one_by_one["passes_per_block"].keys() == {"16"}
    assert one_by_one["ordered_blocks"] > PROBLEMS
    assert -1 <= one_by_one["tau"] <= 1
    assert sum(map(sum, one_by_one["unmasking"])) == one_by_one["tokens"]
    assert found["ablation", "no context KV"]["right"] < PROBLEMS / 2 < found["threshold", "threshold 0.8"]["right"]


def test_the_report(output: Path):
    text = (output / "report.md").read_text()
    assert f"| verified | {PROBLEMS} of {PROBLEMS} | 100.0% | 100.0% | {PROBLEMS} |" in text
    assert "| no context KV |" in text
    for name in ("quality", "steps_per_block", "unmasking", "agreement", "ablations"):
        assert f"]({name}.png)" in text
        assert (output / f"{name}.png").stat().st_size > 5000
