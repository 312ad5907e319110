"""What lies between two mixers of the denoiser: gated residual, then norm and modulation in either order.

``R`` canvases of ``S`` positions, T = R * S; ``H`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.ir.ops import rms_norm


def gated_residual_norm(
    x: Tensor,
    mixed: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    before: bool,
    is_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + gate * mixed``, and that as the next mixer gets it: RMSNorm, after the modulation or ``before`` it.

    Args: x and mixed (T, H), no mixed before the first mixer; gate, shift and scale (R, H), constant over a canvas;
    weight (H,); is_padding (T,) bool, of tokens for which the next mixer gets what it gets for the first.
    Returns two (T, H) in x's dtype, rounded to it after each of the three operations.
    """
    x = x.view(len(shift), -1, x.shape[1])
    if mixed is not None:
        assert gate is not None
        x = torch.addcmul(x, gate.unsqueeze(1), mixed.view(x.shape))
    shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    if before:
        normed = torch.addcmul(shift, rms_norm(x, weight, eps), scale)
    else:
        normed = rms_norm(torch.addcmul(shift, x, scale), weight, eps)
    x, normed = x.flatten(0, 1), normed.flatten(0, 1)
    if is_padding is not None:
        normed = torch.where(is_padding[:, None], normed[:1], normed)
    return x, normed
