"""`vllm serve` with a model and nothing else, as one types it first."""

from __future__ import annotations

import json
from pathlib import Path

from serving import running_server


def test_server_without_options(tiny_folder: Path, tmp_path: Path) -> None:
    problem = json.loads((tiny_folder / "heldout.jsonl").read_text().splitlines()[0])
    with running_server(tiny_folder, tmp_path / "log") as server:
        answer = server.openai.completions.create(
            model=server.model, prompt=problem["prompt"], max_tokens=64, temperature=0
        )
        assert answer.choices[0].text == problem["answer"]
        assert server.log_text().count("kv_cache_memory_bytes=") == 1
