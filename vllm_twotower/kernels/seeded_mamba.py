"""A Mamba-2 block over one canvas or draft: convolution and scan, seeded with the context tower's state.

A canvas is short, so the scan is one dense product instead of a chunked recurrence (arXiv 2405.21060, section 6, with
a single chunk). Nothing is written back: a pass leaves the N states of a cache as they were. ``R`` canvases of ``S``
positions, ``C`` convolution channels, ``n`` heads of ``p`` channels, ``g`` groups of state size ``s``.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def seeded_conv(xbc: Tensor, states: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution, then SiLU.

    Args: xbc (R, S, C); states (N, k - 1, C), the inputs before those of row r at ``indices[r]``; weight (C, k);
    bias (C,) or None. Returns (R, S, C) in fp32.
    """
    inputs, taps = torch.cat((states[indices].to(xbc.dtype), xbc), 1).float(), weight.float()
    positions = xbc.shape[1]
    out = inputs[:, :positions] * taps[:, 0]
    for k in range(1, weight.shape[1]):
        out.addcmul_(inputs[:, k : k + positions], taps[:, k])
    return F.silu(out if bias is None else out + bias.float())


def seeded_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, indices: Tensor
) -> Tensor:
    """Selective scan ``h = exp(dt A) h + dt B x; y = C h + D x`` from ``h = states[indices]``.

    Args: x (R, S, n, p); dt (R, S, n) after softplus; a (n,) negative; b and c (R, S, g, s); d (n,), all fp32;
    states (N, n, p, s) of any float dtype; indices (R,). Returns y (R, S, n, p).
    """
    seed = states[indices].float()
    rows, positions, heads, _ = x.shape
    per_group = heads // b.shape[2]
    log_decay = (dt * a).cumsum(1).transpose(1, 2)  # (R, n, S)
    pairwise = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)  # (R, n, S, S)
    decay = pairwise.add_(_no_later(positions, x.device)).exp_() * dt.transpose(1, 2).unsqueeze(-2)
    scores = c.transpose(1, 2) @ b.permute(0, 2, 3, 1)  # (R, g, S, S)
    mixing = decay.view(rows, -1, per_group, positions, positions).mul_(scores.unsqueeze(2)).flatten(1, 2)
    y = mixing @ x.transpose(1, 2)  # (R, n, S, p)
    carried = c.transpose(1, 2).repeat_interleave(per_group, 1) @ seed.transpose(2, 3)
    y = y.addcmul_(carried, log_decay.exp().unsqueeze(-1)).transpose(1, 2)
    return y + x * d[:, None]


def advanced_state(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
    """The state ``h`` (R, n, p, s) after a :func:`seeded_scan`; positions with ``dt`` 0 leave it as it is."""
    per_group = x.shape[2] // b.shape[2]
    log_decay = (dt * a).cumsum(1)  # (R, S, n)
    weight = (log_decay[:, -1:] - log_decay).exp_() * dt
    gained = (x * weight.unsqueeze(-1)).permute(0, 2, 3, 1) @ b.repeat_interleave(per_group, 2).transpose(1, 2)
    return gained.addcmul_(seed, log_decay[:, -1].exp()[..., None, None])


@cache
def _no_later(positions: int, device: torch.device) -> Tensor:
    """(S, S): -inf where the second position comes after the first, else 0."""
    return torch.full((positions, positions), -math.inf, device=device).triu(1)
