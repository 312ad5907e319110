"""A Mamba-2 block over one canvas or draft: convolution and scan, seeded with the context tower's state.

A canvas is short, so the scan is one dense product instead of a chunked recurrence (arXiv 2405.21060, section 6, with
a single chunk). The N states of a cache stay as they were, until :func:`commit_states`. ``R`` canvases of ``S``
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
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    states: Tensor,
    indices: Tensor,
    out: Tensor,
    lengths: Tensor | None = None,
) -> None:
    """Selective scan ``h = exp(t A) h + t B x; y = C h + D x`` with ``t = softplus(dt + dt_bias)``.

    Args: x (R, S, n, p); a (n,) negative; b and c (R, S, g, s), all fp32; dt (R, S, n), dt_bias and d (n,) and states
    (N, n, p, s) of any float dtype; indices (R,), of the state that row r begins with; out (R, S, n, p), for y;
    lengths (R,), if what lies behind them in a row need not be finite and is not asked for.
    """
    seed, times = states[indices].float(), _times(dt, dt_bias)
    if lengths is not None:
        inert = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        times = times.masked_fill(inert[..., None], 0)
        x, b = (values.masked_fill(inert[..., None, None], 0) for values in (x, b))
    rows, positions, heads, _ = x.shape
    per_group = heads // b.shape[2]
    log_decay = (times * a).cumsum(1).transpose(1, 2)  # (R, n, S)
    pairwise = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)  # (R, n, S, S)
    decay = pairwise.add_(_no_later(positions, x.device)).exp_() * times.transpose(1, 2).unsqueeze(-2)
    scores = c.transpose(1, 2) @ b.permute(0, 2, 3, 1)  # (R, g, S, S)
    mixing = decay.view(rows, -1, per_group, positions, positions).mul_(scores.unsqueeze(2)).flatten(1, 2)
    y = mixing @ x.transpose(1, 2)  # (R, n, S, p)
    carried = c.transpose(1, 2).repeat_interleave(per_group, 1) @ seed.transpose(2, 3)
    y = y.addcmul_(carried, log_decay.exp().unsqueeze(-1)).transpose(1, 2)
    out.copy_(y.addcmul(x, d.float()[:, None]))


def _times(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """The time steps (R, S, n) in fp32."""
    return F.softplus(dt.float() + dt_bias.float())


def commit_states(
    xbc: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    conv_states: Tensor,
    states: Tensor,
    indices: Tensor,
) -> None:
    """Writes the states after the first ``counts`` (R,) positions of each row, in place.

    The other arguments are those of :func:`seeded_conv` and :func:`seeded_scan`. Rows that share a state have no count.
    """
    is_read = torch.arange(x.shape[1], device=counts.device) < counts[:, None]
    times, per_group = _times(dt, dt_bias) * is_read.unsqueeze(-1), x.shape[2] // b.shape[2]
    log_decay = (times * a).cumsum(1)  # (R, S, n)
    weight = (log_decay[:, -1:] - log_decay).exp_() * times
    state = (x * weight.unsqueeze(-1)).permute(0, 2, 3, 1) @ b.repeat_interleave(per_group, 2).transpose(1, 2)
    state.addcmul_(states[indices].float(), log_decay[:, -1].exp()[..., None, None])
    states[indices] = state.to(states.dtype)
    inputs = torch.cat((conv_states[indices].to(xbc.dtype), xbc), 1)
    window = counts[:, None] + torch.arange(conv_states.shape[1], device=counts.device)
    last = inputs.gather(1, window.unsqueeze(-1).expand(-1, -1, inputs.shape[2]))
    conv_states[indices] = last.to(conv_states.dtype)


@cache
def _no_later(positions: int, device: torch.device) -> Tensor:
    """(S, S): -inf where the second position comes after the first, else 0."""
    return torch.full((positions, positions), -math.inf, device=device).triu(1)
