"""On GPUs that are not there: vLLM's kernels for quantised weights, as in the tables of docs/quantization.md."""

from __future__ import annotations

import golden_data
import pytest

pytest.importorskip("vllm")
from serving import printed_by

CARDS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
PLAIN = dict(
    zip(CARDS, (*["TritonExperts"] * 3, "TrtLlmBf16ExpertsMonolithic", *["FlashInferExperts"] * 2), strict=True)
)


@pytest.fixture(scope="module")
def chosen() -> tuple[list, list]:
    """What tests/fake_experts.py prints."""
    return printed_by("fake_experts.py", str(golden_data.checkpoint("A")))


def test_every_scheme_has_kernels(chosen: tuple[list, list]) -> None:
    """vLLM refuses experts whose three projections have different schemes."""
    expected = []
    for card in CARDS:
        multiplies_fp8 = card > (8, 0)
        fp8 = "TritonExperts" if multiplies_fp8 else "MarlinExperts"
        expected += [
            [*card, None, PLAIN[card], None],
            [*card, "int8", "MarlinExperts", "CompressedTensorsWNA16"],
            [*card, "fp8", fp8, f"CompressedTensorsW8A{8 if multiplies_fp8 else 16}Fp8"],
            [*card, "int4", "MarlinExperts", "CompressedTensorsWNA16"],
        ]
    assert chosen[0] == expected


def test_options_that_quantise_at_startup(chosen: tuple[list, list]) -> None:
    """Which of them ``vllm-twotower plan --recommend`` may name for a card."""
    expected = []
    for card in CARDS:
        per_channel = "TritonExperts"
        if card == (8, 0):
            per_channel = (
                "FP8 PTPC online MoE quant is not supported with the MARLIN backend, which does not implement "
                "per-output-channel weight scales."
            )
        nvfp4 = "nvfp4_per_token online quantization requires a Blackwell (SM100) GPU."
        expected += [
            [*card, "fp8_per_channel", per_channel, True],
            [*card, "fp8_per_tensor", "MarlinExperts" if card == (8, 0) else "TritonExperts", True],
            [*card, "int8_per_channel_weight_only", "TritonExperts", False],
            [*card, "nvfp4_per_token", "TrtLlmNvFp4ExpertsMonolithic" if card == (10, 0) else nvfp4, False],
        ]
    assert chosen[1] == expected
