"""Quantises a checkpoint, shard by shard, into one of compressed-tensors, which vLLM reads.

Experts are most of a large model. Routers, norms, convolutions, heads and the time conditioning stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import Converter, convert_checkpoint
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from vllm_twotower.architecture import CheckpointError, TwoTowerConfig, tensor_shapes
from vllm_twotower.checkpoint import WeightCheck, tensor_headers
from vllm_twotower.quantization import CompressedTensors

EXPERTS = "re:.*\\.mixer\\.experts\\.[0-9]+\\."
"""Without an end: vLLM asks for the scheme of the gate too, which these experts lack, by the name ``None``."""
DENSE = "re:.*\\.mixer\\.(shared_experts\\.)?(in_proj|out_proj|q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)$"
SCHEMES = ("int8", "fp8", "int4")
GROUP_SIZE = 64
"""Inputs with a scale of their own in int4: the released model's experts have 1,856, of which 64 is a divisor."""


@dataclass(frozen=True)
class Recipe:
    """The scheme of the experts and of the other matrices of both towers, and the group size of int4."""

    experts: str | None = None
    dense: str | None = None
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        for name in ("experts", "dense"):
            value = getattr(self, name)
            if value is not None and value not in SCHEMES:
                raise CheckpointError(f"{name} is {value!r}: it must be {', '.join(SCHEMES)}, or left out")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise CheckpointError(f"group_size is {self.group_size!r}: it must be a positive number of inputs")
        if self.experts is None and self.dense is None:
            raise CheckpointError("nothing is to be quantised: give experts or dense")

    def config(self) -> QuantizationConfig:
        """What a checkpoint's ``quantization_config`` says."""
        groups = {}
        for name, target in (("experts", EXPERTS), ("dense", DENSE)):
            if (kind := getattr(self, name)) is not None:
                groups[name] = _scheme(kind, target, self.group_size)
        formats = {scheme.format for scheme in groups.values()}
        return QuantizationConfig(
            config_groups=groups,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=["lm_head", "context_lm_head"],
        )


def _scheme(kind: str, target: str, group_size: int) -> QuantizationScheme:
    if kind == "fp8":
        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel")
        activations = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
        return QuantizationScheme(
            targets=[target], weights=weights, input_activations=activations, format="float-quantized"
        )
    if kind == "int8":
        weights = QuantizationArgs(num_bits=8, strategy="channel")
    else:
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=[target], weights=weights, format="pack-quantized")


class _Quantizer(Converter):
    """What compressed-tensors' converter asks: each shard's tensors in their new form, and the configuration."""

    def __init__(self, recipe: Recipe):
        self._config = recipe.config()
        self._quantization = CompressedTensors(self._config.model_dump())

    def validate(self, tensors: Mapping[str, Tensor]) -> None:
        pass  # the layout is checked before

    def get_dependencies(self, weight_name: str) -> set[str]:
        return set()

    def create_config(self) -> QuantizationConfig:
        return self._config

    def process(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        done: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            scheme = self._quantization.scheme(module) if kind == "weight" else None
            parts = {kind: tensor} if scheme is None else compressed(tensor, scheme)
            done |= {f"{module}.{part}" if module else part: value for part, value in parts.items()}
        return done


def compressed(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The tensors in the place of a weight (out, in): rounded to the nearest, scales by the largest value."""
    args = scheme.weights
    groups = weight.float().unflatten(1, (-1, args.group_size if args.strategy == "group" else weight.shape[1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = scale.to(weight.dtype)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("output", type=Path, help="folder that is made")
    parser.add_argument("--experts", choices=SCHEMES, help="how the experts are quantised")
    parser.add_argument("--dense", choices=SCHEMES, help="how the other matrices of both towers are quantised")
    parser.add_argument("--group-size", type=int, help=f"inputs with one scale in int4 (default {GROUP_SIZE})")
    parser.add_argument("--recipe", type=Path, help="a YAML file with experts, dense and group_size in their place")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    try:
        recipe = _recipe(args)
        quantize(args.checkpoint, args.output, recipe)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"vllm-twotower quantize: {error}") from None
    before, after = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (args.checkpoint, args.output)
    )
    print(f"{args.output}: {after / 2**30:.2f} GiB of weights, {before / 2**30:.2f} GiB before.")


def _recipe(args: argparse.Namespace) -> Recipe:
    known = [field.name for field in fields(Recipe)]
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    if args.recipe is None:
        return Recipe(**given)
    if given:
        raise CheckpointError(f"--recipe is given, so {', '.join(given)} must not be")
    content = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointError(f"{args.recipe} must have {', '.join(known)}")
    if unknown := sorted(set(content) - set(known)):
        raise CheckpointError(f"{args.recipe} has {', '.join(unknown)}: known are {', '.join(known)}")
    return Recipe(**content)


def quantize(checkpoint: Path, output: Path, recipe: Recipe) -> None:
    """Writes ``output``, a folder that is not there yet; holds one shard at a time.

    Raises :class:`CheckpointError` for a checkpoint that is incomplete or quantised, or whose matrices the group size
    does not divide.
    """
    config = TwoTowerConfig.from_pretrained(checkpoint)
    if output.exists():
        raise CheckpointError(f"{output} is there already")
    check = WeightCheck(config)
    for name, shape, _ in tensor_headers(checkpoint):
        check.see_shape(name, shape)
    check.finish()
    quantizer = _Quantizer(recipe)
    quantization = CompressedTensors(recipe.config().model_dump())
    for name, shape in tensor_shapes(config).items():
        if name.endswith(".weight"):
            quantization.tensors_of(name.removesuffix(".weight"), shape)
    output.mkdir(parents=True)
    convert_checkpoint(checkpoint, output, quantizer)
