"""The plain model with something taken away from its denoiser: the oracle of the engine's option ``ablation``."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import LayerState


def ablated(
    model: TwoTowerModel,
    mamba_seed: bool = True,
    context_kv: bool = True,
    time: float | None = None,
    experts_per_token: int | None = None,
    skip_denoiser_layers: Sequence[int] = (),
) -> TwoTowerModel:
    """A copy; the arguments are the option's fields."""
    variant = copy.deepcopy(model)
    layers = variant.denoiser_tower.layers
    gone = "M" * (not mamba_seed) + "*" * (not context_kv)
    for number, layer in enumerate(layers):
        if layer.kind == "E" and experts_per_token is not None:
            layer.mixer.gate.top_k = experts_per_token
        if number in skip_denoiser_layers:
            of_mixer = layer.mixer.forward
            layer.mixer.forward = lambda x, *past, of_mixer=of_mixer: _zeros(of_mixer(x, *past))
    whole = variant.denoiser_logits

    def denoiser_logits(canvas: Tensor, context: list[LayerState], t: Tensor) -> Tensor:
        context = [None if layer.kind in gone else one for layer, one in zip(layers, context, strict=True)]
        return whole(canvas, context, t if time is None else torch.full_like(t, time))

    variant.denoiser_logits = denoiser_logits
    return variant


def _zeros(output: Tensor | tuple) -> Tensor | tuple:
    """A mixer's output, or that and what it has seen."""
    return torch.zeros_like(output) if isinstance(output, Tensor) else (torch.zeros_like(output[0]), *output[1:])
