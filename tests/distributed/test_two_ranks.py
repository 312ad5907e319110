"""Two tensor-parallel ranks take the same decisions as one: random requests with every option, against the oracle."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import golden_data
from oracle import expected
from random_requests import RandomRequest, draw_request
from vllm.tokenizers import get_tokenizer

from vllm_twotower.reference import TwoTowerModel

CHECKPOINT = golden_data.checkpoint("C")
TESTS = Path(__file__).parents[1]


def requests() -> list[RandomRequest]:
    rng = random.Random(3)
    return [draw_request(rng) for _ in range(24)]


def test_two_ranks_equal_the_oracle(tmp_path: Path) -> None:
    """In a process of its own, which sets its ranks' cores before vLLM starts."""
    output = tmp_path / "tokens.json"
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_HOST_IP": "127.0.0.1",
        "PYTHONPATH": str(TESTS),
    }
    process = subprocess.run(
        [sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout + process.stderr
    model, tokenizer = TwoTowerModel.from_pretrained(CHECKPOINT), get_tokenizer(str(CHECKPOINT))
    want = [expected(model, request.prompt, request.params(tokenizer)).token_ids for request in requests()]
    assert json.loads(output.read_text()) == want


def main(output: Path) -> None:
    """Writes the tokens of all requests from an engine with two ranks."""
    from vllm import LLM

    llm = LLM(
        str(CHECKPOINT),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        tensor_parallel_size=2,
    )
    drawn = requests()
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt} for request in drawn],
        [request.params() for request in drawn],
        use_tqdm=False,
    )
    output.write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
