"""Quantised checkpoints: recipes, the tensors that must be there, and the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import golden_data
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vllm_twotower.architecture import CheckpointError, TwoTowerConfig, tensor_shapes
from vllm_twotower.checkpoint import WeightCheck, read_tensors
from vllm_twotower.cli import main
from vllm_twotower.model.quantized_cpu import QuantizedProjection, kept_tensors
from vllm_twotower.planning.released import RELEASED_CONFIG
from vllm_twotower.quantization import ModelOpt, quantization_of
from vllm_twotower.quantize import Recipe, compressed, quantize
from vllm_twotower.reference import TwoTowerModel

RECIPES = {
    "int8": Recipe("int8", "int8"),
    "fp8": Recipe("fp8", "fp8"),
    "int4": Recipe("int4", None, 16),
    "mixed": Recipe("int4", "fp8", 16),
}
ERRORS = {"int8": 0.004, "fp8": 0.04, "int4": 0.07, "mixed": 0.07}
"""Half a step between two values of a scheme, as a share of the largest weight of a row or group."""
PLAIN = ("gate.weight", "norm", "conv1d", "embeddings", "lm_head", "t_embedder", "t_block", "scale_shift", "A_log", "D")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """Checkpoint B, its experts in int4."""
    quantize(golden_data.checkpoint("B"), tmp_path / "quantized", RECIPES["int4"])
    return tmp_path / "quantized"


@pytest.mark.parametrize("scheme", RECIPES)
def test_weights_are_close_to_those_before(scheme: str, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "quantized", RECIPES[scheme]
    quantize(golden_data.checkpoint("B"), folder, recipe)
    stored, plain = dict(read_tensors(folder)), dict(read_tensors(golden_data.checkpoint("B")))
    for name, tensor in TwoTowerModel.from_pretrained(folder).state_dict().items():
        before = plain[name]
        if any(part in name for part in PLAIN) or (recipe.dense is None and ".experts." not in name):
            assert torch.equal(stored[name], before), name
            assert torch.equal(tensor, before)
        elif name.endswith("proj.weight"):
            assert name not in stored or stored[name].dtype != before.dtype
            assert (tensor - before).abs().max() <= ERRORS[scheme] * before.abs().max(), name


def test_shards_and_index(tmp_path: Path) -> None:
    """One shard after the other; other files are copied."""
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    tensors = dict(read_tensors(golden_data.checkpoint("A")))
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, source / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text((golden_data.checkpoint("A") / "config.json").read_text())
    (source / "tokenizer.json").write_text("{}")
    main(["quantize", str(source), str(output), "--experts", "int8"])
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for name, file in index.items() if name in weight_map} == {
        name: file for name, file in weight_map.items() if name in index
    }
    assert sum(name.endswith("weight_packed") for name in index) == 16
    assert (output / "tokenizer.json").read_text() == "{}"
    TwoTowerModel.from_pretrained(output)


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces or removes a tensor of a checkpoint in one file."""
    file = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors |= {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


EXPERT = "context_tower.layers.1.mixer.experts.2.up_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{EXPERT}.weight_scale", None, rf"missing .*{EXPERT}.weight_scale \["),
        (f"{EXPERT}.weight_packed", None, rf"missing .*{EXPERT}.weight_packed \["),
        (f"{EXPERT}.weight_scale", torch.zeros(8, 3), rf"tensor {EXPERT}.weight_scale has shape \[8, 3\], .* asks for"),
        (f"{EXPERT}.weight", torch.zeros(2, 2), rf"unexpected tensor {EXPERT}.weight \[2, 2\]"),
        ("lm_head.weight_scale", torch.zeros(1), r"unexpected tensor lm_head.weight_scale \[1\]"),
    ],
)
def test_faults_are_named(quantized: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change(quantized, name, tensor)
    with pytest.raises(CheckpointError, match=message):
        TwoTowerModel.from_pretrained(quantized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq': known are compressed-tensors and modelopt"),
        ({"format": "dense-2"}, "format"),
        ({"config_groups": {"experts": {"targets": []}, "other": 3}}, "is not one of compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quant_algo is 'W4A8': known are FP8 and NVFP4"),
    ],
)
def test_unknown_schemes_are_named(change: dict, message: str) -> None:
    config = Recipe("int8").config().model_dump() | change
    if "format" in change:
        config["config_groups"]["experts"]["format"] = change["format"]
    with pytest.raises(CheckpointError, match=message):
        quantization_of(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is to be quantised: give experts or dense"),
        (
            ["--experts", "int4", "--group-size", "48"],
            "group_size=48 .* does not divide the 64 inputs of context_tower",
        ),
        (["--experts", "int4", "--group-size", "0"], "group_size is 0: it must be a positive number"),
        (["--recipe", "RECIPE"], "has expert: known are experts, dense, group_size"),
        (["--recipe", "RECIPE", "--dense", "int8"], "--recipe is given, so dense must not be"),
    ],
)
def test_bad_recipes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("expert: int8\n")
    arguments = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(["quantize", str(golden_data.checkpoint("B")), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unexpected tensor .*weight_packed"):
        quantize(quantized, tmp_path / "again", RECIPES["int8"])


def test_the_recipes_that_come_along_fit_the_released_model() -> None:
    """Every group of its matrices' inputs is whole."""
    import yaml

    config = TwoTowerConfig.from_dict(RELEASED_CONFIG)
    for file in sorted((Path(__file__).parents[2] / "configs" / "quantize").glob("*.yaml")):
        recipe = Recipe(**yaml.safe_load(file.read_text()))
        quantization = quantization_of(recipe.config().model_dump())
        WeightCheck(config, quantization)
        parts = quantization.tensors_of("context_tower.layers.1.mixer.experts.0.down_proj", (2688, 1856))
        assert parts, file


def test_modelopt() -> None:
    """NVFP4's codes two to a byte, their scales in fp8, and those of the whole tensor; and FP8."""
    fp4 = ModelOpt({"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*.experts.1.*"]})
    assert fp4.tensors_of("lm_head", (32, 64)) is None
    assert fp4.tensors_of("a.experts.1.up_proj", (32, 64)) is None
    assert fp4.tensors_of("a.gate", (32, 64)) is None
    assert fp4.tensors_of("a.experts.0.up_proj", (32, 64)) == {
        "weight": (32, 32),
        "weight_scale": (32, 4),
        "weight_scale_2": None,
    }
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    weight = fp4.weight("", {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.tensor(0.5)})
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert weight.tolist() == [[*values, *(-value for value in values)]]
    fp8 = ModelOpt({"quant_algo": "FP8"})
    parts = {"weight": torch.tensor([[2.0]]).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.25)}
    assert fp8.weight("", parts).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (Recipe("int8").config().model_dump(), None),
        (Recipe("int8").config().model_dump() | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "float8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            "float8",
        ),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": []}}, "FP8"),
    ],
)
def test_scales_of_keys_and_values_need_a_scheme(config: dict, scheme: str | None) -> None:
    """The last configuration is one of the file ``hf_quant_config.json``."""
    quantization = quantization_of(config)
    assert quantization.cache_scheme == scheme
    assert quantization.may_have("context_tower.layers.2.mixer.k_scale") == (scheme is not None)
    assert quantization.may_have("context_tower.layers.2.mixer.q_proj.input_scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "group_size"), [("int8", 64), ("int4", 32), ("int4", 16)])
@pytest.mark.parametrize("tokens", [1, 6, 16])
def test_products_equal_those_of_weights(dtype: torch.dtype, scheme: str, group_size: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(48, 96, generator=generator).to(dtype)
    x = torch.randn(tokens, 96, generator=generator).to(dtype)
    config = Recipe(scheme, group_size=group_size).config()
    [of_experts] = config.config_groups.values()
    quantization = quantization_of(config.model_dump())
    stored = compressed(weight, of_experts)
    groups = 96 // group_size if scheme == "int4" else 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        projection = QuantizedProjection((48, 96), of_experts.weights, groups, 0)
    finally:
        torch.set_default_dtype(before)
    name = "a.mixer.experts.0.up_proj"
    for part, value in kept_tensors(quantization, name, stored).items():
        parameter = getattr(projection, part)
        parameter.weight_loader(parameter, value)
    want = F.linear(x.float(), quantization.weight(name, stored).float())
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.2}
    torch.testing.assert_close(projection(x).float(), want, **close)


def test_every_plain_tensor_comes_once() -> None:
    """Whatever the order in which a checkpoint's tensors come."""
    config = TwoTowerConfig.from_pretrained(golden_data.checkpoint("A"))
    shapes, quantization = tensor_shapes(config), quantization_of(Recipe("int8", "fp8").config().model_dump())
    tensors = []
    for name, tensor in read_tensors(golden_data.checkpoint("A")):
        module, _, kind = name.rpartition(".")
        scheme = quantization.scheme(module) if kind == "weight" else None
        parts = {kind: tensor} if scheme is None else compressed(tensor, scheme)
        tensors += [(f"{module}.{part}" if module else part, value) for part, value in parts.items()]
    for order in (tensors, tensors[::-1], sorted(tensors, key=lambda item: item[0].rpartition(".")[2])):
        assert sorted(name for name, _ in quantization.plain_tensors(order, shapes)) == sorted(shapes)


def test_inspect_shows_the_scheme_of_every_part(quantized: Path, capsys: pytest.CaptureFixture) -> None:
    main(["inspect", str(quantized)])
    shown = capsys.readouterr().out
    assert "context tower and head, experts: int4, groups of 16 (64)" in shown
    assert "denoiser tower and head, other matrices: as they are" in shown
    assert "MiB as stored" in shown
    change(quantized, f"{EXPERT}.weight_scale", None)
    with pytest.raises(SystemExit, match=rf"missing: {EXPERT}.weight_scale"):
        main(["inspect", str(quantized)])
