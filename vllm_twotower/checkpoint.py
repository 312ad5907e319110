"""The tensors of a TwoTower checkpoint on disk: read strictly as :mod:`vllm_twotower.architecture` says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from vllm_twotower.architecture import CheckpointError, TwoTowerConfig, is_of_context, tensor_shapes

INDEX = "model.safetensors.index.json"

if TYPE_CHECKING:
    from vllm_twotower.quantization import Quantization


class WeightCheck:
    """Compares the tensors of a checkpoint with the layout as they pass by, without holding them.

    With ``context_alone`` the checkpoint need not have, and is not shown, what only the denoiser needs.
    """

    def __init__(self, config: TwoTowerConfig, quantization: Quantization | None = None, context_alone: bool = False):
        self._quantization = quantization
        shapes = tensor_shapes(config, context_alone)
        self._missing: dict[str, tuple[int, ...] | None] = {**shapes}
        if quantization is not None:
            self._missing = quantization.stored_shapes(shapes)

    def seen(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each checked as by :meth:`see_shape`, without the scales of quantised keys and values."""
        for name, tensor in tensors:
            self.see_shape(name, tuple(tensor.shape))
            if self._quantization is None or not self._quantization.is_cache_scale(name):
                yield name, tensor

    def see_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Notes one tensor; raises :class:`CheckpointError` if it is unexpected, doubled, or has another shape."""
        if name not in self._missing:
            if self._quantization is not None and self._quantization.may_have(name):
                return
            raise CheckpointError(f"unexpected tensor {name} {list(shape)} in a TwoTower checkpoint")
        expected = self._missing.pop(name)
        if expected is not None and shape != expected:
            raise CheckpointError(f"tensor {name} has shape {list(shape)}, the configuration asks for {list(expected)}")

    def finish(self) -> None:
        """Raises :class:`CheckpointError` naming (up to eight of) the tensors that did not come."""
        if self._missing:
            names = [f"{name} {list(shape or ())}" for name, shape in self._missing.items()]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            if not any(map(is_of_context, self._missing)):
                more += "; the context tower is served alone with additional_config['twotower'].towers='context'"
            raise CheckpointError(f"missing in the TwoTower checkpoint: {', '.join(names[:8])}{more}")


def read_quantization(folder: str | Path) -> Quantization | None:
    """How the weights of a folder are quantised, by its ``config.json``; None if they are not.

    Older releases of ModelOpt write ``hf_quant_config.json`` instead, which vLLM reads too.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None and (of_modelopt := Path(folder) / "hf_quant_config.json").is_file():
        config = json.loads(of_modelopt.read_text(encoding="utf-8"))
    if not config:
        return None
    from vllm_twotower.quantization import quantization_of

    return quantization_of(config)


def _shards(folder: str | Path) -> Iterator[safe_open]:
    """The opened safetensors files of a folder, one after the other (one file or many shards)."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            yield tensors


def read_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields ``(name, tensor)`` from all safetensors files of a folder, one at a time."""
    for tensors in _shards(folder):
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, tensors.get_tensor(name)


def tensor_headers(folder: str | Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor of a folder's safetensors files, read from their headers alone."""
    for tensors in _shards(folder):
        for name in tensors.keys():  # noqa: SIM118
            one = tensors.get_slice(name)
            yield name, tuple(one.get_shape()), one.get_dtype()


def lacks_denoiser(folder: str | Path) -> bool:
    """Whether a folder's safetensors files hold the context tower alone, by their headers; False without such files.

    Where there is an index, it is enough that exactly those of its files are gone that held nothing of the context
    tower: of the others, one may hold the end of one tower and the beginning of the other.
    """
    files, index = {file.name for file in Path(folder).glob("*.safetensors")}, Path(folder) / INDEX
    if files and all(is_of_context(name) for name, _, _ in tensor_headers(folder)):
        return True
    file_of = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    return files == {file for name, file in file_of.items() if is_of_context(name)} < set(file_of.values())
