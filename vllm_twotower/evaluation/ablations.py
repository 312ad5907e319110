"""What the denoiser makes of its inputs: the plain model with one of them taken away."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import LayerState

State = list[LayerState]
Change = Callable[[TwoTowerModel, State, Tensor], tuple[State, Tensor]]


def _without(kind: str) -> Change:
    """Takes the context tower's states from the layers of one kind."""

    def change(model: TwoTowerModel, state: State, t: Tensor) -> tuple[State, Tensor]:
        layers = model.denoiser_tower.layers
        return [None if layer.kind == kind else one for layer, one in zip(layers, state, strict=True)], t

    return change


def _frozen_time(model: TwoTowerModel, state: State, t: Tensor) -> tuple[State, Tensor]:
    return state, torch.full_like(t, 0.5)


ABLATIONS: dict[str, Change] = {
    "t always 0.5": _frozen_time,
    "no Mamba states of the context": _without("M"),
    "no keys and values of the context": _without("*"),
}


def ablated(model: TwoTowerModel, change: Change) -> TwoTowerModel:
    """The model, sharing its weights, with a denoiser whose context states and t go through ``change`` first."""
    variant = copy.copy(model)

    def denoiser_logits(canvas: Tensor, context: State, t: Tensor) -> Tensor:
        return model.denoiser_logits(canvas, *change(model, context, t))

    variant.denoiser_logits = denoiser_logits  # type: ignore[method-assign, assignment]  # of this copy alone
    return variant
