"""On GPUs that are not there: the attention backends of both towers, and for which rows passes are captured."""

from __future__ import annotations

import golden_data
import pytest

pytest.importorskip("vllm")
from serving import printed_by
from vllm.v1.attention.backend import AttentionBackend

from vllm_twotower.model.denoiser import _own_backend


@pytest.fixture(scope="module")
def configured() -> tuple[list, list]:
    """What tests/fake_cuda.py prints."""
    return printed_by("fake_cuda.py", str(golden_data.checkpoint("A")))


def test_every_gpu_gets_a_backend_that_writes_the_canvas(configured: tuple[list, list]) -> None:
    """On sm_100 vLLM prefers FlashInfer for causal models, which drops the denoiser's keys and values."""
    assert configured[0] == [
        [*capability, dtype, backend, precision, precision is not None]
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
        for dtype, backend, precision in (("bfloat16", "FLASH_ATTN", None), ("float32", "TRITON_ATTN", "ieee"))
    ]


def test_rows_that_passes_are_captured_for(configured: tuple[list, list]) -> None:
    """In the order of ``GRAPH_OPTIONS``; vLLM counts the tokens of their canvases."""
    (default, many, eager, none, decode, piecewise, sizes, odd, largest, small) = configured[1]
    assert default == decode == ["FULL_DECODE_ONLY", [16, 32, 48, 64]]
    assert many == ["FULL_DECODE_ONLY", [16 * rows for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, *range(16, 65, 8))]]
    assert eager == none == ["NONE", []]
    assert sizes == ["FULL_DECODE_ONLY", [16, 64]]
    assert largest == ["FULL_DECODE_ONLY", [16, 32, 48]]
    assert "cudagraph_mode='PIECEWISE' is not supported for TwoTower models: passes are captured one" in piecewise[0]
    assert "cudagraph_capture_sizes=[16, 24] is not supported" in odd[0]
    assert "[24] are no multiples of canvas_length=16" in odd[0]
    assert "max_cudagraph_capture_size=8 is not supported" in small[0]
    assert "canvas_length=16 at least" in small[0]


def test_a_backend_that_drops_the_canvas_is_refused() -> None:
    class FlashInfer(AttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "FLASHINFER"

    with pytest.raises(ValueError, match="FLASHINFER is not supported .*FLASH_ATTN, TRITON_ATTN, CPU_ATTN"):
        _own_backend(FlashInfer)
