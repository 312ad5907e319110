"""What the denoiser makes of its inputs: right answers when one of them is taken away, with the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_twotower.evaluation.likelihood import Encode, answer
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import LayerState
from vllm_twotower.training.problems import Problem, is_right

State = list[LayerState]
Change = Callable[[TwoTowerModel, State, Tensor], tuple[State, Tensor]]


def _nothing(model: TwoTowerModel, state: State, t: Tensor) -> tuple[State, Tensor]:
    return state, t


def _without(kind: str) -> Change:
    """Takes the context tower's states from the layers of one kind."""

    def change(model: TwoTowerModel, state: State, t: Tensor) -> tuple[State, Tensor]:
        layers = model.denoiser_tower.layers
        return [None if layer.kind == kind else one for layer, one in zip(layers, state, strict=True)], t

    return change


def _frozen_time(model: TwoTowerModel, state: State, t: Tensor) -> tuple[State, Tensor]:
    return state, torch.full_like(t, 0.5)


ABLATIONS: dict[str, Change] = {
    "as trained": _nothing,
    "t always 0.5": _frozen_time,
    "no Mamba states of the context": _without("M"),
    "no keys and values of the context": _without("*"),
}


def ablated(model: TwoTowerModel, change: Change) -> TwoTowerModel:
    """The model, sharing its weights, with a denoiser whose context states and t go through ``change`` first."""
    variant = copy.copy(model)

    def denoiser_logits(canvas: Tensor, context: State, t: Tensor) -> Tensor:
        return model.denoiser_logits(canvas, *change(model, context, t))

    variant.denoiser_logits = denoiser_logits
    return variant


def ablations(
    model: TwoTowerModel,
    problems: Sequence[Problem],
    encode: Encode,
    decode: Callable[[list[int]], str],
    bos: int,
    gamma: float,
    max_tokens: int,
) -> dict[str, int]:
    """Right answers to the problems by mask diffusion, greedily, for each of :data:`ABLATIONS`."""
    right = {}
    for name, change in ABLATIONS.items():
        variant, right[name] = ablated(model, change), 0
        for problem in problems:
            tokens = answer(variant, problem, encode, bos, gamma, max_tokens).tokens
            right[name] += is_right(decode(tokens), problem)
    return right
