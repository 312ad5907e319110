"""What lies between two mixers of the denoiser: gated residual, then norm and modulation in either order.

``R`` canvases of ``S`` positions, T = R * S; ``H`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.ir.ops import rms_norm


def gated_residual_norm(
    x: Tensor, mixed: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, eps: float, before: bool
) -> tuple[Tensor, Tensor]:
    """``x + gate * mixed``, and that as the next mixer gets it: RMSNorm, after the modulation or ``before`` it.

    Args: x and mixed (T, H); gate, shift and scale (R, H), constant over a canvas; weight (H,).
    Returns two (T, H) in x's dtype, rounded to it after each of the three operations.
    """
    by_row = (len(gate), -1, x.shape[1])
    gate, shift, scale = gate.unsqueeze(1), shift.unsqueeze(1), scale.unsqueeze(1)
    x = torch.addcmul(x.view(by_row), gate, mixed.view(by_row))
    if before:
        return x.view(mixed.shape), torch.addcmul(shift, rms_norm(x, weight, eps), scale).view(mixed.shape)
    return x.view(mixed.shape), rms_norm(torch.addcmul(shift, x, scale), weight, eps).view(mixed.shape)
