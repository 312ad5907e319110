"""Kernels of the denoiser, of drafts and of decisions: each in torch, and in Triton for tensors on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

from torch import Tensor

from . import modulated_norm, random_numbers, seeded_mamba, unmasking, vocabulary

__all__ = [
    "commit_states",
    "drawn",
    "gated_residual_norm",
    "masses",
    "most_confident",
    "row_statistics",
    "seeded_conv",
    "seeded_scan",
    "uniform",
]


def _by_device(in_torch: Callable[..., Any]) -> Callable[..., Any]:
    """The function in torch, or its namesake in Triton if the first argument is on a GPU."""

    @cache
    def on_gpu() -> Callable[..., Any]:
        module = in_torch.__module__.rpartition(".")[2]
        return getattr(import_module(f".on_gpu.{module}", __package__), in_torch.__name__)

    @wraps(in_torch)
    def kernel(first: Tensor, *rest: Any) -> Any:
        return (on_gpu() if first.is_cuda else in_torch)(first, *rest)

    return kernel


commit_states = _by_device(seeded_mamba.commit_states)
drawn = _by_device(vocabulary.drawn)
gated_residual_norm = _by_device(modulated_norm.gated_residual_norm)
masses = _by_device(vocabulary.masses)
most_confident = _by_device(unmasking.most_confident)
row_statistics = _by_device(vocabulary.row_statistics)
seeded_conv = _by_device(seeded_mamba.seeded_conv)
seeded_scan = _by_device(seeded_mamba.seeded_scan)
uniform = _by_device(random_numbers.uniform)
