"""Quantised checkpoints in an engine: the tokens of the plain model with the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import golden_data
import pytest
import torch
from engines import assert_idle, generate, running_engine, tokens_of
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from vllm_twotower.checkpoint import read_tensors
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


def ask_for_quantized_cache(folder: Path) -> None:
    """As checkpoints of LLM Compressor do: in the configuration, and with a scale a layer."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(read_tensors(folder))
    scales = {name.replace("k_proj.weight", "k_scale") for name in tensors if name.endswith(".k_proj.weight")}
    tensors |= {name.replace("k_scale", f"{of}_scale"): torch.full((1,), 7.0) for name in scales for of in "kv"}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def test_keys_and_values_are_kept_as_they_are(tmp_path: Path) -> None:
    """Also of a checkpoint that asks for FP8, which vLLM would turn to by itself."""
    folder, plain = tmp_path / "asks", tmp_path / "quantized"
    quantize(golden_data.checkpoint("A"), plain, RECIPES["int8"])
    quantize(golden_data.checkpoint("A"), folder, RECIPES["int8"])
    ask_for_quantized_cache(folder)
    options = {"dtype": "bfloat16", "max_model_len": 256}
    with pytest.raises(ValueError, match="kv_cache_dtype='auto' .* asks for float8 keys and values.*give 'bfloat16'"):
        LLM(str(folder), **options)
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * len(PROMPTS)
    with running_engine(plain, **options) as llm:
        want = tokens_of(generate(llm, PROMPTS, params))
    with running_engine(folder, kv_cache_dtype="bfloat16", **options) as llm:
        assert tokens_of(generate(llm, PROMPTS, params)) == want
    assert all("k_scale" not in name for name in TwoTowerModel.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("value", ["int8_per_channel_weight_only", "fp8"])
def test_other_quantization_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"quantization={value!r} is not supported .*vllm-twotower quantize"):
        LLM(str(golden_data.checkpoint("A")), quantization=value, dtype="bfloat16", max_model_len=256)
