"""Quantised checkpoints in an engine: the tokens of the plain model with the weights that they stand for."""

from __future__ import annotations

from pathlib import Path

import golden_data
import pytest
from engines import assert_idle, generate, running_engine, tokens_of
from vllm import LLM, SamplingParams

from vllm_twotower.model.quantized_cpu import QuantizedProjection
from vllm_twotower.quantize import Recipe, quantize
from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion

RECIPES = {"int8": Recipe("int8", "int8"), "fp8": Recipe("fp8", "fp8"), "int4": Recipe("int4", "fp8", 16)}
PROMPTS = [list(range(4 + i, 30 + 2 * i)) for i in range(4)]


@pytest.mark.parametrize("scheme", RECIPES)
@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_tokens_are_those_of_the_weights(name: str, scheme: str, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    quantize(golden_data.checkpoint(name), folder, RECIPES[scheme])
    model = TwoTowerModel.from_pretrained(folder)
    want = [
        tuple(generate_mask_diffusion(model, prompt, 40, block_size=16, steps=16, gamma=0.8).tokens)
        for prompt in PROMPTS
    ]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with running_engine(folder) as llm:
        modules = llm.apply_model(lambda model: [type(module) for module in model.modules()])[0]
        assert (QuantizedProjection in modules) == ("E" in model.config.pattern and scheme != "fp8")
        assert tokens_of(generate(llm, PROMPTS, [params] * len(PROMPTS))) == want
        assert_idle(llm)


@pytest.mark.parametrize("value", ["int8_per_channel_weight_only", "fp8"])
def test_other_quantization_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"quantization={value!r} is not supported .*vllm-twotower quantize"):
        LLM(str(golden_data.checkpoint("A")), quantization=value, dtype="bfloat16", max_model_len=256)
