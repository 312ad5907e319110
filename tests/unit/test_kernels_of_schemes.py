"""On GPUs that are not there: vLLM's kernels for the checkpoints that ``vllm-twotower quantize`` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest

pytest.importorskip("vllm")
from serving import server_environment


def test_vllm_has_kernels_for_every_scheme() -> None:
    """The table of docs/quantization.md; vLLM refuses experts whose three projections have different schemes."""
    script = [sys.executable, str(Path(__file__).parents[1] / "fake_experts.py"), str(golden_data.checkpoint("A"))]
    done = subprocess.run(script, env=server_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = {(8, 0): "TritonExperts", (9, 0): "TritonExperts", (10, 0): "TrtLlmBf16ExpertsMonolithic"}
    expected = []
    for card in ((8, 0), (9, 0), (10, 0), (12, 0)):
        fp8 = ("MarlinExperts", "CompressedTensorsW8A16Fp8"), ("TritonExperts", "CompressedTensorsW8A8Fp8")
        integers = "MarlinExperts", "CompressedTensorsWNA16"
        expected += [
            [*card, None, plain.get(card, "FlashInferExperts"), None],
            [*card, "int8", *integers],
            [*card, "fp8", *fp8[card > (8, 0)]],
            [*card, "int4", *integers],
        ]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
