"""Quantised checkpoints: which tensors stand in the place of a weight, and the weights made of them again."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from torch import Tensor

from vllm_twotower.architecture import CheckpointError

Shape = tuple[int, ...]
LINEAR = re.compile(r"(.*\.)?(in_proj|out_proj|[qkvo]_proj|up_proj|down_proj|lm_head|context_lm_head)")
"""Modules that "Linear" means in a configuration: routers, the time conditioning and what is no matrix stay out."""
EXPERT = re.compile(r"(.*)\.experts\.\d+\.(up|down)_proj")
INPUT_SCALES = ("input_scale", "input_zero_point", "input_global_scale")
"""Tensors for quantised activations, which vLLM's kernels for GPUs read."""
CACHE_SCALES = ("q_scale", "k_scale", "v_scale")
"""Tensors for quantised keys and values, which no engine here keeps: both towers read them as they are."""


class Quantization(ABC):
    """How a checkpoint's weights are quantised."""

    cache_scheme: str | None = None
    """How the checkpoint asks for keys and values to be kept; None: in the model's dtype."""

    @abstractmethod
    def tensors_of(self, module: str, shape: Shape) -> dict[str, Shape | None] | None:
        """The tensors, by their names in the module, in the place of a weight of this shape; None if it is plain.

        A shape of None may be any.
        """

    def may_have(self, name: str) -> bool:
        """Whether a tensor of this name may be there or not."""
        return name.rpartition(".")[2] in INPUT_SCALES or self.is_cache_scale(name)

    def is_cache_scale(self, name: str) -> bool:
        """Whether a tensor of this name belongs to :attr:`cache_scheme`."""
        return self.cache_scheme is not None and name.rpartition(".")[2] in CACHE_SCALES

    @abstractmethod
    def scheme_name(self, module: str) -> str | None:
        """The scheme of a module's weight in words; None if it is plain."""

    @abstractmethod
    def weight(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight (out, in) that a quantised module's tensors stand for, in a float dtype."""

    def stored_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape | None]:
        """The tensors of a checkpoint whose plain ones have these ``shapes``."""
        stored: dict[str, Shape | None] = {}
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            parts = self.tensors_of(module, shape) if kind == "weight" else None
            stored |= {name: shape} if parts is None else {f"{module}.{part}": of for part, of in parts.items()}
        return stored

    def plain_tensors(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, Shape],
        converted: Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor] | None] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint's tensors with weights in the place of quantised ones, or what they are ``converted`` to.

        A module's tensors wait for one another, those of other modules do not. ``shapes`` are those of plain tensors.
        """
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            shape = shapes.get(f"{module}.weight")
            needed = None if shape is None else self.tensors_of(module, shape)
            if needed is None:
                yield name, tensor
                continue
            found = waiting.setdefault(module, {})
            if kind in needed:
                found[kind] = tensor
            if len(found) == len(needed):
                del waiting[module]
                new = None if converted is None else converted(module, found)
                for part, value in ({"weight": self.weight(module, found)} if new is None else new).items():
                    yield f"{module}.{part}", value


def quantization_of(config: Mapping[str, Any] | None) -> Quantization | None:
    """That of a ``quantization_config``; None without one. Raises :class:`CheckpointError` for one that is unknown."""
    if not config:
        return None
    if "quant_algo" in (of_modelopt := config.get("quantization") or {}):  # as in ModelOpt's own hf_quant_config.json
        return ModelOpt(of_modelopt)
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return CompressedTensors(config)
    if method in ("modelopt", "modelopt_fp4"):
        return ModelOpt(config)
    raise CheckpointError(f"quantization_config.quant_method is {method!r}: known are compressed-tensors and modelopt")


class CompressedTensors(Quantization):
    """Checkpoints of compressed-tensors: each group of modules has a scheme, and a format that it is written in."""

    def __init__(self, config: Mapping[str, Any]):
        try:
            self._config = QuantizationConfig.model_validate(dict(config))
        except ValueError as error:
            raise CheckpointError(f"quantization_config is not one of compressed-tensors: {error}") from None
        for scheme in self._config.config_groups.values():
            self._compressor(scheme)
        if (cache := self._config.kv_cache_scheme) is not None:
            self.cache_scheme = f"{cache.type}{cache.num_bits}"

    def scheme(self, module: str) -> QuantizationScheme | None:
        """The scheme of a module's weight; None if it is plain."""
        if any(match_name(module, name) for name in self._config.ignore or ()):
            return None
        for scheme in self._config.config_groups.values():
            for target in scheme.targets:
                if match_name(module, target) or (target == "Linear" and LINEAR.fullmatch(module)):
                    return scheme
        return None

    def _compressor(self, scheme: QuantizationScheme) -> type[BaseCompressor]:
        name = scheme.format or self._config.format
        try:
            return BaseCompressor.get_value_from_registry(name)
        except KeyError:
            raise CheckpointError(f"quantization_config.format is {name!r}, which compressed-tensors lacks") from None

    def tensors_of(self, module: str, shape: Shape) -> dict[str, Shape | None] | None:
        scheme = self.scheme(module)
        if scheme is None or len(shape) != 2:
            return None
        args = scheme.weights
        group = args.group_size
        if group and group > 0 and shape[1] % group:
            raise CheckpointError(
                f"group_size={group} of quantization_config does not divide the {shape[1]} inputs of {module}"
            )
        known = {"weight": shape, "weight_shape": (2,), "weight_scale": _scale_shape(args, shape)}
        if (scheme.format or self._config.format) == "pack-quantized":
            known["weight_packed"] = (shape[0], -(-shape[1] // (32 // args.num_bits)))
        elif args.num_bits == 4:
            known["weight_packed"] = (shape[0], shape[1] // 2)
        names = self._compressor(scheme).compression_param_names(scheme)
        return {name: known.get(name) for name in names if name.startswith("weight")}

    def scheme_name(self, module: str) -> str | None:
        scheme = self.scheme(module)
        if scheme is None:
            return None
        args, activations = scheme.weights, scheme.input_activations
        scale = f"groups of {args.group_size}" if args.group_size else f"a scale a {args.strategy}"
        inputs = "" if activations is None else f", inputs in {activations.type}{activations.num_bits}"
        return f"{args.type}{args.num_bits}, {scale}{inputs}"

    def weight(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scheme = self.scheme(module)
        return self._compressor(scheme).decompress(dict(tensors), scheme)["weight"]


def _scale_shape(args: QuantizationArgs, shape: Shape) -> Shape | None:
    """Of a weight of this shape."""
    if args.strategy in ("group", "tensor_group"):
        return shape[0], shape[1] // args.group_size
    return {"channel": (shape[0], 1), "tensor": (1,)}.get(args.strategy)


_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The values of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3)."""


@dataclass
class ModelOpt(Quantization):
    """Checkpoints of NVIDIA's Model Optimizer: FP8 with a scale a tensor, or NVFP4 with one for sixteen inputs."""

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._algorithm = self.config.get("quant_algo")
        self._excluded = [*(self.config.get("exclude_modules") or ()), *(self.config.get("ignore") or ())]
        if self._algorithm not in ("FP8", "NVFP4"):
            raise CheckpointError(f"quantization_config.quant_algo is {self._algorithm!r}: known are FP8 and NVFP4")
        scheme = self.config.get("kv_cache_scheme") or self.config.get("kv_cache_quant_algo")
        self.cache_scheme = f"{scheme['type']}{scheme['num_bits']}" if isinstance(scheme, dict) else scheme

    def tensors_of(self, module: str, shape: Shape) -> dict[str, Shape | None] | None:
        if not self._is_quantized(module):
            return None
        if self._algorithm == "FP8":
            return {"weight": shape, "weight_scale": None}
        if shape[1] % 16:
            raise CheckpointError(f"NVFP4 has groups of 16, which do not divide the {shape[1]} inputs of {module}")
        packed, scale = (shape[0], shape[1] // 2), (shape[0], shape[1] // 16)
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": None}

    def scheme_name(self, module: str) -> str | None:
        return None if not self._is_quantized(module) else f"{self._algorithm} of ModelOpt"

    def _is_quantized(self, module: str) -> bool:
        return bool(LINEAR.fullmatch(module)) and not any(fnmatch(module, name) for name in self._excluded)

    def weight(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        weight, scale = tensors["weight"], tensors["weight_scale"].float()
        if self._algorithm == "FP8":
            return weight.float() * scale
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1).int()  # the lower half is the first
        values = _FP4[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        scale = scale * tensors["weight_scale_2"].float()
        return (values.unflatten(1, (-1, 16)) * scale.unsqueeze(-1)).flatten(1)
