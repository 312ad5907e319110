"""The attention backends of both towers: on GPUs those that vLLM's own selection gives, and no other ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest

pytest.importorskip("vllm")
from serving import server_environment
from vllm import EngineArgs
from vllm.v1.attention.backend import AttentionBackend

from vllm_twotower.model.denoiser import _own_backend


def test_every_gpu_gets_a_backend_that_writes_the_canvas() -> None:
    """On sm_100 vLLM prefers FlashInfer for causal models, which drops the denoiser's keys and values."""
    # vLLM keeps what it finds about a model's class, which it cannot load where the platform is a fake.
    EngineArgs(model=str(golden_data.checkpoint("A"))).create_model_config()
    script = [sys.executable, str(Path(__file__).parents[1] / "fake_cuda.py"), str(golden_data.checkpoint("A"))]
    done = subprocess.run(script, env=server_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [*capability, dtype, backend, precision, precision is not None]
        for capability in ((8, 0), (9, 0), (10, 0), (12, 0), (12, 1))
        for dtype, backend, precision in (("bfloat16", "FLASH_ATTN", None), ("float32", "TRITON_ATTN", "ieee"))
    ]


def test_a_backend_that_drops_the_canvas_is_refused() -> None:
    class FlashInfer(AttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "FLASHINFER"

    with pytest.raises(ValueError, match="FLASHINFER is not supported .*FLASH_ATTN, TRITON_ATTN, CPU_ATTN"):
        _own_backend(FlashInfer)
