"""The denoiser with something taken away: what the engine's option ``ablation`` asks for, in developer mode.

A normal server refuses the option, and imports nothing of this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from vllm_twotower.model.denoiser import CanvasRows, DenoiserAttention, DenoiserMambaMixer, DenoiserTower
from vllm_twotower.model.time_conditioning import TimeConditioning
from vllm_twotower.options import ADDITIONAL_CONFIG_KEY, EngineOptions, RequestError


@dataclass(frozen=True)
class Ablation:
    """What the denoiser lacks; the context tower stays whole.

    Without ``mamba_seed`` its Mamba layers start from zeros, without ``context_kv`` its attention sees the canvas
    alone. ``time`` is what it is told in every pass. Each token gets ``experts_per_token`` experts; the layers
    ``skip_denoiser_layers``, counted from 0, do nothing.
    """

    mamba_seed: bool = True
    context_kv: bool = True
    time: float | None = None
    experts_per_token: int | None = None
    skip_denoiser_layers: tuple[int, ...] = ()


def check(options: EngineOptions, vllm_config: VllmConfig) -> None:
    """Raises RequestError unless this engine may have the ablation that its options ask for."""
    name, given = f"additional_config['{ADDITIONAL_CONFIG_KEY}'].ablation", options.ablation
    if not envs.VLLM_SERVER_DEV_MODE:
        raise RequestError(name, given, "is for experiments, and needs VLLM_SERVER_DEV_MODE=1 in the environment")
    if options.context_alone:
        raise RequestError(name, given, "needs the denoiser, and the context tower is alone here")
    if current_platform.support_static_graph_mode() and not vllm_config.model_config.enforce_eager:
        raise RequestError(name, given, "needs --enforce-eager: ablated passes are not captured as CUDA graphs")
    known = [field.name for field in fields(Ablation)]
    if not isinstance(given, Mapping):
        raise RequestError(name, given, f"must be a mapping of {', '.join(known)}")
    rules = _rules(vllm_config.model_config.hf_config)
    for field, value in given.items():
        if field not in rules:
            raise RequestError(f"{name}.{field}", value, f"unknown; known are {', '.join(known)}")
        is_right, words = rules[field]
        if not is_right(value):
            raise RequestError(f"{name}.{field}", value, words)


def _rules(config: PretrainedConfig) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """By field: whether a value is right, and what is allowed in words."""
    layers, experts = len(config.hybrid_override_pattern), config.n_routed_experts
    flag = (lambda value: isinstance(value, bool)), "must be true or false"
    has_experts = "E" in config.hybrid_override_pattern
    return {
        "mamba_seed": flag,
        "context_kv": flag,
        "time": (
            lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1,
            "must be a number greater than 0 and at most 1",
        ),
        "experts_per_token": (
            lambda value: has_experts and _is_integer(value) and 1 <= value <= experts,
            f"must be an integer from 1 to {experts}" if has_experts else "the model has no experts",
        ),
        "skip_denoiser_layers": (
            lambda value: isinstance(value, list | tuple) and all(_is_integer(i) and 0 <= i < layers for i in value),
            f"must be a list of layers from 0 to {layers - 1}",
        ),
    }


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def ablated(given: Mapping[str, Any]) -> tuple[Callable[..., DenoiserTower], Callable[..., TimeConditioning]]:
    """What makes the denoiser tower and its time conditioning, in the place of their classes."""
    ablation = Ablation(**given)
    return partial(_tower, ablation), TimeConditioning if ablation.time is None else partial(FixedTime, ablation.time)


class FixedTime(TimeConditioning):
    """The time conditioning at one time."""

    def __init__(self, time: float, hidden_size: int, num_layers: int):
        super().__init__(hidden_size, num_layers)
        self._time = time

    def forward(self, t: Tensor) -> Tensor:
        """t (R,) -> (R, 3, H), the same whatever t is."""
        return super().forward(torch.full_like(t, self._time))


def _tower(ablation: Ablation, vllm_config: VllmConfig, prefix: str) -> DenoiserTower:
    if ablation.experts_per_token is not None:
        vllm_config, model_config = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
        model_config.hf_config = copy.copy(model_config.hf_config)
        model_config.hf_config.num_experts_per_tok = ablation.experts_per_token
        vllm_config.model_config = model_config
    tower = DenoiserTower(vllm_config, prefix)
    for number, layer in enumerate(tower.layers):
        mixer = layer.mixer
        if number in ablation.skip_denoiser_layers:
            mixer.forward = _nothing
        elif isinstance(mixer, DenoiserMambaMixer) and not ablation.mamba_seed:
            mixer.forward = partial(_without_seed, mixer.forward)  # type: ignore[method-assign]  # of this layer
        elif isinstance(mixer, DenoiserAttention) and not ablation.context_kv:
            mixer.forward = partial(_canvas_attention, mixer)  # type: ignore[method-assign]  # of this layer
    return tower


def _nothing(hidden_states: Tensor, rows: CanvasRows | None = None) -> Tensor:
    return torch.zeros_like(hidden_states)


def _without_seed(forward: Callable[[Tensor, CanvasRows], Tensor], hidden_states: Tensor, rows: CanvasRows) -> Tensor:
    return forward(hidden_states, replace(rows, state_indices={}))


def _canvas_attention(mixer: DenoiserAttention, hidden_states: Tensor, rows: CanvasRows) -> Tensor:
    """(T, H) -> (T, H): every token attends to its own canvas, but for what is inert there."""
    qkv, _ = mixer.qkv_proj(hidden_states)
    q, k, v = (
        part.view(rows.num_rows, rows.width, -1, mixer.head_dim).transpose(1, 2)
        for part in qkv.split([mixer.q_size, mixer.kv_size, mixer.kv_size], dim=-1)
    )
    is_padding, seen = get_forward_context().is_padding, None
    if is_padding is not None:
        seen = ~is_padding.view(rows.num_rows, 1, 1, rows.width)
        seen[..., 0] = True  # a row that is wholly inert must see something
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=mixer.scaling, enable_gqa=True)
    return mixer.o_proj(y.transpose(1, 2).reshape(len(hidden_states), -1))[0]
