"""With this package installed, vLLM serves any other model as it does without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_data
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="compares vLLM's CPU platform with ours"),
]

SCRIPT = Path(__file__).parents[1] / "plain_model.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden_data.checkpoint("A") / name, folder)
    return folder


def start(checkpoint: Path, **environment: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    command = [sys.executable, str(SCRIPT), str(checkpoint)]
    return subprocess.Popen(command, env=inherited | environment, stdout=subprocess.PIPE, text=True)


def test_nothing_changes(checkpoint: Path) -> None:
    """But for the name of Ray's device, which another model never comes to: see tests/unit/test_platform.py."""
    processes = {"with": start(checkpoint), "without": start(checkpoint, VLLM_PLUGINS="")}
    results: dict[str, dict[str, Any]] = {}
    for name, process in processes.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, name
        results[name] = json.loads(output.splitlines()[-1])
    devices = [result["platform"].pop("ray_device_key") for result in results.values()]
    assert devices == ["'GPU'", "''"]
    assert results["without"]["environment"].pop("VLLM_PLUGINS") == ""
    assert results["with"]["replaced"] == []
    assert len({tuple(tokens) for tokens in results["with"]["tokens"]["greedy"]}) > 1
    for name, found in results["without"].items():
        assert results["with"][name] == found, name
