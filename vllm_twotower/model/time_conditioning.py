"""adaLN-single: how the masked fraction of a canvas shifts, scales and gates every denoiser layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_twotower.reference.layers import TimestepEmbedder


class TimeConditioning(nn.Module):
    """The time embedding and the per-layer tables; parameters are small and replicated on every rank.

    The embedding is the reference's own module: its rounding decides logits in the third decimal.
    """

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))
        self.scale_shift_tables = nn.ParameterList(torch.empty(3, hidden_size) for _ in range(num_layers))

    def forward(self, t: Tensor) -> Tensor:
        """t (R,) masked fractions in [0, 1] -> (R, 3, H), what all layers share; add a layer's table to it."""
        return self.t_block(self.t_embedder(t)).unflatten(-1, (3, -1))
