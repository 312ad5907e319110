"""`vllm bench serve`, the command as users type it, needs nothing special."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import golden_data
from serving import REPOSITORY, START_SECONDS, Server, server_environment, vllm_command

PROMPTS = 30
INPUT_LENGTH = 40
OUTPUT_LENGTH = 33


def test_random_prompts(server: Server, tmp_path: Path) -> None:
    before = server.metrics()
    process = subprocess.run(
        vllm_command(
            "bench",
            "serve",
            *("--base-url", server.url),
            *("--model", server.model),
            *("--tokenizer", str(golden_data.checkpoint("A"))),
            *("--dataset-name", "random"),
            *("--num-prompts", str(PROMPTS)),
            *("--random-input-len", str(INPUT_LENGTH)),
            *("--random-output-len", str(OUTPUT_LENGTH)),
            *("--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
        ),
        cwd=REPOSITORY,
        env=server_environment(),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (PROMPTS, 0)
    assert result["errors"] == [""] * PROMPTS
    assert result["output_lens"] == [OUTPUT_LENGTH] * PROMPTS
    assert result["total_output_tokens"] == PROMPTS * OUTPUT_LENGTH
    assert all(text for text in result["generated_texts"])

    after = server.metrics()
    blocks = after["vllm:twotower_num_blocks_total"] - before["vllm:twotower_num_blocks_total"]
    assert blocks == PROMPTS * 3
    assert result["diffusion_committed_tokens"] == PROMPTS * 48
