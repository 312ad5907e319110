"""adaLN-single: how the masked fraction of a canvas shifts, scales and gates every denoiser layer."""

from __future__ import annotations

import math
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from vllm_twotower.architecture import TIMESTEP_FREQUENCIES


class TimeConditioning(nn.Module):
    """The time embedding and the per-layer tables; parameters are small and replicated on every rank."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))
        self.scale_shift_tables = nn.ParameterList(torch.empty(3, hidden_size) for _ in range(num_layers))

    def forward(self, t: Tensor) -> Tensor:
        """t (R,) masked fractions in [0, 1] -> (R, 3, H), what all layers share; add a layer's table to it."""
        return self.t_block(self.t_embedder(t)).unflatten(-1, (3, -1))


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of 1000 t (cosines first), then Linear, SiLU, Linear.

    The time is rounded to the model's dtype before and after the multiplication, the frequencies are fp32: one ulp
    there moves logits by up to 1e-3.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """t (R,) in [0, 1] -> (R, H)."""
        dtype = cast(nn.Linear, self.mlp[0]).weight.dtype
        return self.mlp(sinusoidal_embedding(t.to(dtype) * 1000).to(dtype))


def sinusoidal_embedding(t: Tensor) -> Tensor:
    """t (R,) -> (R, 256) fp32: ``[cos(t f) | sin(t f)]`` with ``f = exp(-ln(10000) k / 128)``, k = 0..127."""
    angles = t.float()[:, None] * _frequencies(t.device)
    return torch.cat((angles.cos(), angles.sin()), -1)


@torch.compiler.assume_constant_result  # the compiler warns of cached functions that it traces
def _frequencies(device: torch.device) -> Tensor:
    return _cached_frequencies(device)


@cache
def _cached_frequencies(device: torch.device) -> Tensor:
    half = TIMESTEP_FREQUENCIES // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
