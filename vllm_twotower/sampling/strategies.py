"""Which positions of a canvas a denoiser pass commits, and at what time the denoiser is told it runs.

A strategy is a pure function of what one pass predicted; nothing here knows of vLLM's engine. Three are built in, from
NVIDIA's Megatron-LM (``megatron/diffusion/two_tower/diffusion_process.py``). Others register by an entry point in the
group ``vllm_twotower.strategies`` whose object is a :class:`Strategy`; its name is then a value of
``diffusion_strategy``.

Shapes: R canvases (rows) of at most S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from vllm_twotower.kernels import most_confident, uniform
from vllm_twotower.kernels.unmasking import at_least_to_finish, most

from .row_options import RowOptions

ENTRY_POINT_GROUP = "vllm_twotower.strategies"
MIN_TIME = 1e-5
"""Where the time grid ends (Megatron-LM's ``min_t``)."""
ADAPTIVE_START = 0.4
"""Share of the passes that commit one token each in adaptive unmasking (Megatron-LM)."""


@dataclass
class DenoiserPass:
    """What one pass predicted for R canvases.

    ``confidence`` is the probability of ``prediction`` before temperature and filters, ``margin`` the difference of
    the two largest of these probabilities. ``energy`` is T times the logarithm of the sum of ``p ** (1 / T)`` over the
    tokens that top-k, top-p and min-p leave, and its limit, the logarithm of the largest probability, at temperature
    T = 0. ``margin`` and ``energy`` are there for strategies that name them in ``needs``. Values where ``masked`` is
    false have no meaning.
    """

    prediction: Tensor
    """(R, S) int64."""
    confidence: Tensor
    """(R, S) fp32."""
    masked: Tensor
    """(R, S) bool: the positions still to fill."""
    step: Tensor
    """(R,) int64: passes the block has had before this one."""
    start: Tensor
    """(R,) int64: the sequence position of the canvas's first token."""
    width: Tensor
    """(R,) int64: positions of the canvas."""
    margin: Tensor | None = None
    """(R, S) fp32."""
    energy: Tensor | None = None
    """(R, S) fp32."""

    def rows(self, index: Tensor) -> DenoiserPass:
        """The canvases ``index`` (n,) alone."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if x is None else x[index] for name, x in columns.items()}
        return DenoiserPass(**chosen)


@dataclass
class Commit:
    """``positions`` (R, S) bool to commit, and the ``step`` (R,) int64 of the block at which that happened.

    The step is the pass's own unless the strategy's clock went on without a new pass.
    """

    positions: Tensor
    step: Tensor


def masked_share(masked_fraction: Tensor, step: Tensor, options: RowOptions) -> Tensor:
    """The time of a pass is the share of its canvas that is still masked: (R,) fp32 of (R,) fp32."""
    return masked_fraction


@dataclass(frozen=True)
class Strategy:
    """How blocks are unmasked.

    ``commit`` decides over all rows at once, each by itself: a row's result must not depend on the others. The last
    pass that ``max_steps`` allows commits all that is left, whatever the strategy says.
    ``options`` names the request options (fields of ``RequestOptions``) that mean something to it; a request that sets
    another one is refused. ``time`` gives the denoiser's time (R,) in (0, 1] from (masked fraction, step, options).
    ``needs`` names the fields of :class:`DenoiserPass` that are computed for it alone.
    """

    commit: Callable[[DenoiserPass, RowOptions], Commit]
    options: frozenset[str] = frozenset()
    time: Callable[[Tensor, Tensor, RowOptions], Tensor] = masked_share
    needs: frozenset[str] = frozenset()


def confidence_unmasking(denoised: DenoiserPass, options: RowOptions) -> Commit:
    """Commits the most confident masked positions, see :func:`~vllm_twotower.kernels.unmasking.most_confident`."""
    threshold, step = options.confidence_threshold, denoised.step
    positions = most_confident(denoised.confidence, denoised.masked, threshold, step, options.max_steps)
    return Commit(positions, step)


def _linear(t: Tensor) -> Tensor:
    return 1 - t


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(t * (math.pi / 2))


def _exponential(t: Tensor, rate: float = 3.0) -> Tensor:
    return (torch.exp(-rate * t) - math.exp(-rate)) / (1 - math.exp(-rate))


NOISE_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
"""alpha(t), the probability that a token is not masked at time t: 1 at t = 0, 0 at t = 1."""

REMASKING_SCORES = ("confidence", "margin", "random")
"""By what ``predict_and_noise`` ranks predictions; the lowest are masked again."""


def grid_time(step: Tensor, max_steps: Tensor) -> Tensor:
    """The time of a step on the grid from 1 to ``MIN_TIME`` in ``max_steps`` equal steps, fp64."""
    return 1 - torch.minimum(step, max_steps).double() * (1 - MIN_TIME) / max_steps


def alpha(t: Tensor, options: RowOptions) -> Tensor:
    """alpha(t) of each row's noise schedule for times (R, ...), fp64."""
    schedule = options.noise_schedule.view(-1, *(1,) * (t.ndim - 1))
    values = [torch.where(schedule == i, function(t), 0) for i, function in enumerate(NOISE_SCHEDULES.values())]
    return torch.stack(values).sum(0)


def scheduled_time(masked_fraction: Tensor, step: Tensor, options: RowOptions) -> Tensor:
    """The masked share 1 - alpha that the noise schedule expects at this step, (R,) fp32."""
    step = torch.minimum(step, options.max_steps - 1)
    return (1 - alpha(grid_time(step, options.max_steps), options)).float()


def _random(denoised: DenoiserPass, options: RowOptions, step: Tensor) -> Tensor:
    """Uniform numbers (R, ..., S) for steps (R, ...), others than those that draw tokens."""
    column = torch.arange(denoised.masked.shape[1], device=step.device)
    seed, start = (of_row.view(-1, *(1,) * step.ndim) for of_row in (options.seed, denoised.start))
    return uniform(seed, start, step[..., None], column, torch.ones_like(column))


def predict_and_noise(denoised: DenoiserPass, options: RowOptions) -> Commit:
    """Predicts all, then masks again the lowest-ranked: as many as the noise schedule leaves masked at the next step.

    With ``adaptive_unmasking`` the first 40 % of the passes commit one token each, the others an equal share of what
    is left. Ranked by confidence, by the margin to the second choice, or at random.
    """
    masked, step = denoised.masked, denoised.step
    n = masked.sum(1)
    after = 1 - alpha(grid_time(step + 1, options.max_steps), options)
    scheduled = n - torch.minimum((after * denoised.width).long(), n - 1).clamp(min=0)
    slow = step / options.max_steps < ADAPTIVE_START
    adaptive = torch.where(slow, 1, at_least_to_finish(n, step, options.max_steps))
    k = torch.where(options.adaptive_unmasking, adaptive, scheduled)
    k = torch.where(step >= options.max_steps - 1, n, k)

    assert denoised.margin is not None
    by = options.remasking[:, None]
    score = torch.where(by == REMASKING_SCORES.index("margin"), denoised.margin, denoised.confidence).double()
    score = torch.where(by == REMASKING_SCORES.index("random"), _random(denoised, options, step), score)
    return Commit(most(score, masked, k), step)


def posterior(denoised: DenoiserPass, options: RowOptions) -> Commit:
    """Samples the reverse posterior of absorbing diffusion, q(x_s | x_t, prediction) (MDLM, arXiv 2406.07524).

    A token has posterior probability ``r p(token)`` and the mask ``1 - r``, with
    ``r = (alpha_s - alpha_t) / (1 - alpha_t)``. Tempered, and with the token drawn from its own distribution first,
    that is: commit with probability ``sigmoid((logit(r) + energy) / T)``, and at T = 0 where the argument is positive.
    A step that commits nothing leaves the canvas as it was, so the next one follows without a new pass, as in
    Megatron-LM, which caches the model's output. The last step commits what is left.
    """
    assert denoised.energy is not None
    masked, last = denoised.masked, options.max_steps - 1
    ahead = torch.arange(int(options.max_steps.max()), device=masked.device)
    steps = torch.minimum(torch.maximum(ahead, denoised.step[:, None]), torch.maximum(last, denoised.step)[:, None])
    before, after = (
        alpha(grid_time(steps + i, options.max_steps[:, None]), options) for i in (0, 1)
    )  # (R, max_steps) each
    r = ((after - before) / (1 - before))[..., None]
    argument = torch.log(r) - torch.log1p(-r) + denoised.energy[:, None].double()  # (R, max_steps, S)
    temperature = options.temperature.view(-1, 1, 1).double()
    drawn = _random(denoised, options, steps) < torch.sigmoid(argument / temperature.clamp(min=1e-5))
    commits = torch.where(temperature > 0, drawn, argument > 0) | (steps >= last[:, None])[..., None]
    commits &= masked[:, None]
    first = commits.any(2).to(torch.int8).argmax(1)
    rows = torch.arange(len(masked), device=masked.device)
    return Commit(commits[rows, first], steps[rows, first])


BUILT_IN: dict[str, Strategy] = {
    "confidence_unmasking": Strategy(confidence_unmasking, frozenset({"confidence_threshold"})),
    "predict_and_noise": Strategy(
        predict_and_noise,
        frozenset({"noise_schedule", "adaptive_unmasking", "remasking"}),
        scheduled_time,
        frozenset({"margin"}),
    ),
    "posterior": Strategy(posterior, frozenset({"noise_schedule"}), scheduled_time, frozenset({"energy"})),
}


@cache
def strategies() -> dict[str, Strategy]:
    """All strategies by name, built-in ones first; raises ValueError for an entry point that cannot be one."""
    found = dict(BUILT_IN)
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        if entry.name in found:
            raise ValueError(f"entry point {entry.value!r} in {ENTRY_POINT_GROUP}: the name {entry.name!r} is taken")
        strategy = entry.load()
        if not isinstance(strategy, Strategy):
            raise ValueError(
                f"entry point {entry.value!r} in {ENTRY_POINT_GROUP} must be a Strategy, not {type(strategy).__name__}"
            )
        found[entry.name] = strategy
    return found
