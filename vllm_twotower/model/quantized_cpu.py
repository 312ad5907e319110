"""Experts of int8 and int4 on CPUs, multiplied by torch's own kernels or turned into weights one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.utils import set_weight_attrs

from vllm_twotower.quantization import EXPERT, CompressedTensors, Quantization

INT4_GROUPS = (32, 64, 128, 256)
"""The group sizes of torch's int4 kernel, which takes outputs in sixteens."""


def quantized_projection(
    quantization: Quantization | None, module: str, shape: tuple[int, int], shard_dim: int, ranks: int
) -> QuantizedProjection | None:
    """A rank's slice (out, in) of an expert's matrix, cut along ``shard_dim``; None if its weight is plain here.

    Raises ValueError if the ranks would share a group of inputs.
    """
    args = kept_values(quantization, module)
    if args is None:
        return None
    groups = 1
    if args.strategy == "group":
        if shape[1] % args.group_size:
            raise ValueError(
                f"tensor_parallel_size={ranks} is not possible: it would cut the groups of {args.group_size} inputs "
                f"that {module} is quantised in"
            )
        groups = shape[1] // args.group_size
    return QuantizedProjection(shape, args, groups, shard_dim)


def kept_values(quantization: Quantization | None, module: str) -> QuantizationArgs | None:
    """How an expert's weight is quantised; None for other modules, and for schemes that are turned into weights.

    FP8 is one of these: torch turns it into other numbers so slowly on CPUs that products took twenty times as long.
    """
    if not isinstance(quantization, CompressedTensors) or not EXPERT.fullmatch(module):
        return None
    scheme = quantization.scheme(module)
    if scheme is None or scheme.weights.strategy not in ("channel", "group") or not scheme.weights.symmetric:
        return None
    return scheme.weights if scheme.weights.type == "int" and scheme.weights.num_bits in (4, 8) else None


def kept_tensors(quantization: Quantization, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What :class:`QuantizedProjection` loads of a module's tensors; None if weights are made of them."""
    args = kept_values(quantization, module)
    if args is None:
        return None
    values = tensors.get("weight")
    if values is None:
        shape = torch.Size(tensors["weight_shape"].tolist())
        values = unpack_from_int32(tensors["weight_packed"], args.num_bits, shape)
    return {"weight": values, "weight_scale": tensors["weight_scale"]}


class QuantizedProjection(nn.Module):
    """A matrix (out, in) of values of 8 or 4 bits with a scale for each of the ``groups`` of an output's inputs.

    Values of 4 bits are packed as torch's kernel wants them, if it takes their shape.
    """

    def __init__(self, shape: tuple[int, int], args: QuantizationArgs, groups: int, shard_dim: int):
        super().__init__()
        self._shape, self._groups, self._shard_dim = shape, groups, shard_dim
        self._group_size = shape[1] // groups
        self._is_packed = args.num_bits == 4 and self._group_size in INT4_GROUPS and shape[0] % 16 == 0
        self._is_int8 = args.num_bits == 8 and groups == 1
        weight = torch.zeros(shape, dtype=torch.int8)
        self.weight = nn.Parameter(_packed(weight) if self._is_packed else weight, requires_grad=False)
        # torch's int4 kernel wants scales and zeros side by side, of one group after the other.
        scale = torch.zeros(groups, shape[0], 2) if self._is_packed else torch.empty(shape[0], groups)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load_values})
        set_weight_attrs(self.weight_scale, {"weight_loader": self._load_scale})

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        scale = self.weight_scale
        if self._is_int8:
            return torch._weight_int8pack_mm(x, self.weight, scale[:, 0])
        if self._is_packed:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self._group_size, scale)
        values = self.weight.to(scale.dtype).unflatten(1, (self._groups, -1))
        return F.linear(x, (values * scale.unsqueeze(-1)).flatten(1))

    def _load_values(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        values = self._part(loaded, self._shape[self._shard_dim])
        parameter.data.copy_(_packed(values) if self._is_packed else values)

    def _load_scale(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        scale = self._part(loaded, (self._shape[0], self._groups)[self._shard_dim])
        of_outputs = parameter.data[..., 0].t() if self._is_packed else parameter.data
        of_outputs.copy_(scale)

    def _part(self, loaded: Tensor, size: int) -> Tensor:
        """This rank's; a scale of a whole row is every rank's."""
        if loaded.shape[self._shard_dim] == size:
            return loaded
        return loaded.narrow(self._shard_dim, get_tensor_model_parallel_rank() * size, size)


def _packed(values: Tensor) -> Tensor:
    """Values (out, in) from -8 to 7 as torch's int4 kernel wants them."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu((values.int() + 8).contiguous(), 1)
